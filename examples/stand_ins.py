"""Three small classifiers as Hugging Face folders, to try everything without a download.

Their weights are random, so that their labels mean nothing; all else is as with real models.
Needs nearfar[convert].

python examples/stand_ins.py stand-ins
nearfar convert stand-ins/animal -o .nearfar/models/animal
nearfar convert stand-ins/word -o .nearfar/models/word
nearfar convert stand-ins/mood -o .nearfar/models/mood
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("folder", type=Path)
arguments = parser.parse_args()
torch.manual_seed(0)


def animal(folder: Path) -> None:
    """Of images: a ResNet that sees 64 x 64 pixels."""
    labels = dict(enumerate(("cat", "dog", "elk", "fox")))
    config = transformers.ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", id2label=labels
    )
    transformers.ResNetForImageClassification(config).save_pretrained(folder)
    settings = {
        "image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 72},
        "crop_size": {"height": 64, "width": 64}, "do_center_crop": True, "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25], "resample": 3,
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))


def word(folder: Path) -> None:
    """Of sounds: a wav2vec 2.0 that hears 16,000 samples in a second."""
    config = transformers.Wav2Vec2Config(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        conv_dim=(16, 16, 16), conv_stride=(5, 4, 4), conv_kernel=(10, 8, 4),
        num_feat_extract_layers=3, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4,
        classifier_proj_size=16, mask_time_prob=0.0, id2label={0: "no", 1: "yes"},
    )  # fmt: skip
    transformers.Wav2Vec2ForSequenceClassification(config).save_pretrained(folder)
    extractor = transformers.Wav2Vec2FeatureExtractor(
        sampling_rate=16_000, do_normalize=True, return_attention_mask=False
    )
    extractor.save_pretrained(folder)


def mood(folder: Path) -> None:
    """Of texts: a BERT."""
    config = transformers.BertConfig(
        vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=128, id2label={0: "sad", 1: "glad"},
    )  # fmt: skip
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["[PAD]", "[CLS]", "[SEP]"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator([str(__doc__)], trainer)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]")  # noqa: S106
    fast.save_pretrained(folder)


for make in (animal, word, mood):
    make(arguments.folder / make.__name__)
    print(arguments.folder / make.__name__)
