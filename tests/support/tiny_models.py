"""Tiny models with random weights in the formats that converters read: for plumbing, not quality.

Needs torch, transformers, tokenizers and gguf; writing one takes a second or two.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from converters import texts

VOCABULARY_SIZE = 512


def write_tokenizer(path: Path, *, special: tuple[str, ...] = ("<pad>", "<s>", "</s>")) -> None:
    """A byte-level BPE ``tokenizer.json`` trained on real text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=list(special),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([texts.prose()], trainer)
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": special[0],
        "bos_token": special[1],
        "eos_token": special[2],
        "model_max_length": 512,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(settings))


def write_tiny_llama(path: Path, architecture: str = "Llama", **changes: Any) -> Path:
    """A Hugging Face folder with a two-layer language model."""
    import torch
    import transformers

    path.mkdir(parents=True)
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY_SIZE,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    torch.manual_seed(0)
    config = getattr(transformers, f"{architecture}Config")(**(settings | changes))
    model = getattr(transformers, f"{architecture}ForCausalLM")(config)
    model.save_pretrained(str(path))
    write_tokenizer(path)
    return path


def write_tiny_bert(path: Path, *, pooling: str = "mean", kind: str = "Bert") -> Path:
    """A folder with a two-layer sentence encoder, as sentence-transformers saves it."""
    import torch
    import transformers

    path.mkdir(parents=True)
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 130,
    }  # fmt: skip
    if kind == "DistilBert":
        sizes = {"dim": 64, "hidden_dim": 128, "n_layers": 2, "n_heads": 4,
                 "max_position_embeddings": 128}  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(vocab_size=VOCABULARY_SIZE, **sizes)
    getattr(transformers, f"{kind}Model")(config).save_pretrained(str(path))
    write_tokenizer(path, special=("[PAD]", "[CLS]", "[SEP]"))
    (path / "sentence_bert_config.json").write_text('{"max_seq_length": 64}')
    package = "sentence_transformers.models"
    modules = [{"type": f"{package}.{name}"} for name in ("Transformer", "Pooling", "Normalize")]
    (path / "modules.json").write_text(json.dumps(modules))
    (path / "1_Pooling").mkdir()
    modes = {
        "pooling_mode_mean_tokens": pooling == "mean",
        "pooling_mode_cls_token": pooling == "cls",
    }
    (path / "1_Pooling" / "config.json").write_text(json.dumps(modes))
    (path / "README.md").write_text("---\nlicense: apache-2.0\n---\n# tiny\n")
    return path


def write_tiny_text_classifier(
    path: Path,
    *,
    labels: tuple[str, ...] = ("calm", "glad", "sad"),
    kind: str = "Bert",
    **config: Any,
) -> Path:
    """A folder with a one-layer classifier of texts whose answers differ from text to text."""
    import torch
    import transformers

    path.mkdir(parents=True)
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1,
        "num_attention_heads": 4, "max_position_embeddings": 130,
    }  # fmt: skip
    model_config = getattr(transformers, f"{kind}Config")(
        vocab_size=VOCABULARY_SIZE, id2label=dict(enumerate(labels)), **(sizes | config)
    )
    model = getattr(transformers, f"{kind}ForSequenceClassification")(model_config)
    ids = torch.randint(3, VOCABULARY_SIZE, (64, 20))
    _spread(model, model.classifier, input_ids=ids)
    model.save_pretrained(str(path))
    write_tokenizer(path, special=("[PAD]", "[CLS]", "[SEP]"))
    return path


def _spread(model: Any, head: Any, **inputs: Any) -> None:
    """Give a random head weights with which every class is the answer to something."""
    import torch

    with torch.no_grad():
        logits = model.eval()(**inputs).logits
        scale = 2 / logits.std(dim=0)
        head.bias.copy_((head.bias - logits.mean(dim=0)) * scale)
        head.weight.mul_(scale[:, None])


def write_tiny_image_classifier(path: Path) -> Path:
    """A folder with a small ResNet for pictures of 32 pixels, cut out of 40."""
    import torch
    import transformers

    path.mkdir(parents=True)
    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic",
        id2label=dict(enumerate(("cat", "dog", "elk", "fox"))),
    )  # fmt: skip
    model = transformers.ResNetForImageClassification(config).eval()
    _spread(model, model.classifier[1], pixel_values=torch.randn(64, 3, 4, 4).repeat(1, 1, 8, 8))
    model.save_pretrained(str(path))
    settings = {
        "image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 32},
        "crop_pct": 0.8, "do_normalize": True, "image_mean": [0.5, 0.4, 0.3],
        "image_std": [0.2, 0.25, 0.3], "resample": 3,
    }  # fmt: skip
    (path / "preprocessor_config.json").write_text(json.dumps(settings))
    return path


def write_tiny_audio_classifier(path: Path) -> Path:
    """A folder with a one-layer wav2vec 2.0 for two words."""
    import torch
    import transformers

    path.mkdir(parents=True)
    torch.manual_seed(0)
    config = transformers.Wav2Vec2Config(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        conv_dim=(16, 16, 16), conv_stride=(5, 4, 4), conv_kernel=(10, 8, 4),
        num_feat_extract_layers=3, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4,
        classifier_proj_size=16, mask_time_prob=0.0, id2label={0: "no", 1: "yes"},
    )  # fmt: skip
    model = transformers.Wav2Vec2ForSequenceClassification(config).eval()
    time = torch.arange(4000) * torch.rand(32, 1)
    _spread(model, model.classifier, input_values=torch.sin(time) + 0.2 * torch.randn(32, 4000))
    model.save_pretrained(str(path))
    transformers.Wav2Vec2FeatureExtractor(
        sampling_rate=8000, do_normalize=True, return_attention_mask=False
    ).save_pretrained(str(path))
    return path


def write_tiny_gguf(path: Path, *, kind: str = "F32") -> Path:
    """A GGUF file with a one-layer Llama and a byte-level BPE tokenizer.

    With another `kind`, such as ``Q4_1``, its matrices are of that type and its embedding Q8_0, as
    llama.cpp makes small models.
    """
    import gguf
    import numpy as np

    folder = path.parent
    write_tokenizer(folder)
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    generator = np.random.default_rng(0)
    hidden, inner = 64, 128

    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("tiny")
    writer.add_license("mit")
    writer.add_block_count(1)
    writer.add_context_length(512)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(16)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if position < 3 else 1 for position in range(len(tokens))])
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    shapes = {
        "token_embd.weight": (len(tokens), hidden),
        "output_norm.weight": (hidden,),
        "blk.0.attn_norm.weight": (hidden,),
        "blk.0.ffn_norm.weight": (hidden,),
        "blk.0.attn_q.weight": (hidden, hidden),
        "blk.0.attn_k.weight": (hidden // 2, hidden),
        "blk.0.attn_v.weight": (hidden // 2, hidden),
        "blk.0.attn_output.weight": (hidden, hidden),
        "blk.0.ffn_gate.weight": (inner, hidden),
        "blk.0.ffn_up.weight": (inner, hidden),
        "blk.0.ffn_down.weight": (hidden, inner),
    }
    for name, shape in shapes.items():
        values = generator.standard_normal(shape) * 0.05
        tensor = (1 + values if len(shape) == 1 else values).astype(np.float32)
        if kind == "F32" or len(shape) == 1:
            writer.add_tensor(name, tensor)
            continue
        stored = gguf.GGMLQuantizationType["Q8_0" if name == "token_embd.weight" else kind]
        data = gguf.quants.quantize(tensor, stored)
        writer.add_tensor(name, data, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
