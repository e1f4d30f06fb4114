"""A transformers language model as a function of its KV cache, in operators that ONNX has.

Written for the export: the cache is plain tensors in and out, the mask is worked out in the open,
and attention does not copy keys and values for every group of heads that shares them.
"""

from __future__ import annotations

from typing import Any

from converters.libraries import load
from nearfar.errors import ConversionError

_ATTENTION = "nearfar-grouped"
#: Added to scores of what may not be seen. Not infinite: a row that sees nothing (padding) would
#: become NaN. In the range of FP16, whatever a compiler makes of it.
_HIDDEN = -60000.0


def text_config(config: Any) -> Any:
    """What a model says about its language part."""
    return config.get_text_config(decoder=True)


def cache_shape(config: Any) -> tuple[int, int, int]:
    """Layers, heads of keys and values, and their width.

    Raises:
        ConversionError: Layers remember in another way than by keys and values of all tokens.
    """
    text = text_config(config)
    kinds = set(getattr(text, "layer_types", None) or ())
    other = kinds - {"full_attention", "sliding_attention", "chunked_attention"}
    heads = getattr(text, "num_attention_heads", None)
    if other or not heads or getattr(text, "is_encoder_decoder", False):
        raise ConversionError(
            f"A model of the kind {config.model_type!r} keeps something else than keys and values "
            f"({', '.join(sorted(other)) or 'no attention heads'})",
            fix="Leave the onnx-… variants out",
        )
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    shared = getattr(text, "num_key_value_heads", None) or heads
    return int(text.num_hidden_layers), int(shared), int(width)


def context_limit(config: Any) -> int:
    """Tokens that the exported model is right for.

    Layers that see only a window of the last tokens see all in the graph: up to the window's size
    that is the same.

    Raises:
        ConversionError: The model does not say.
    """
    text = text_config(config)
    limits = [getattr(text, "max_position_embeddings", None)]
    kinds = getattr(text, "layer_types", None)
    # Models without a list of kinds use the window in all layers, where they have one.
    if kinds is None or "sliding_attention" in kinds:
        limits.append(getattr(text, "sliding_window", None))
    if kinds is not None and "chunked_attention" in kinds:
        limits.append(getattr(text, "attention_chunk_size", None))
    known = [int(limit) for limit in limits if isinstance(limit, int) and limit > 0]
    if not known:
        raise ConversionError(
            "The model does not say how long its context is",
            fix="Set max_position_embeddings in its config.json",
        )
    return min(known)


def cached_decoder(model: Any) -> Any:
    """A torch module: (ids, mask, positions, past tensors) to (logits, present tensors).

    Args:
        model: A causal language model of transformers; its attention is replaced.
    """
    torch, transformers = load("torch"), load("transformers")
    transformers.AttentionInterface.register(_ATTENTION, _attend)
    model.set_attn_implementation(_ATTENTION)
    layers = cache_shape(model.config)[0]

    class CachedDecoder(torch.nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: Any, mask: Any, positions: Any, past: Any) -> Any:
            new = ids.shape[1]
            columns = torch.arange(mask.shape[1])
            # Row i of the new tokens stands behind all old ones and i new ones.
            rows = columns[mask.shape[1] - new :]
            seen = (columns[None, :] <= rows[:, None])[None] & (mask[:, None, :] != 0)
            added = torch.where(seen, 0.0, _HIDDEN)[:, None]  # (batch, 1, new, total)
            cache = _Cache(past)
            logits = self.model(
                input_ids=ids, attention_mask=added, position_ids=positions,
                past_key_values=cache, use_cache=True,
            ).logits  # fmt: skip
            present = tuple(tensor for layer in range(layers) for tensor in cache.present[layer])
            return logits.float(), present

    return CachedDecoder().eval()


class _Cache:
    """What transformers asks of a cache, over tensors that were given.

    Attributes:
        present: Layer to its keys and values, old and new.
    """

    is_compileable = False

    def __init__(self, past: Any) -> None:
        self._past = past
        self.present: dict[int, tuple[Any, Any]] = {}

    def update(self, keys: Any, values: Any, layer_idx: int, *_: Any, **__: Any) -> tuple[Any, Any]:
        """Put new keys and values behind the old ones."""
        torch = load("torch")
        old = self._past[2 * layer_idx : 2 * layer_idx + 2]
        pair = torch.cat([old[0], keys], dim=2), torch.cat([old[1], values], dim=2)
        self.present[layer_idx] = pair
        return pair

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        """How many tokens are old."""
        return self._past[2 * layer_idx].shape[2]


def _attend(
    module: Any,
    query: Any,
    key: Any,
    value: Any,
    attention_mask: Any,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    **options: Any,
) -> tuple[Any, None]:
    """Grouped attention: heads that share keys and values are rows of one product.

    transformers' own (``eager``) first copies keys and values for every head, which for a long
    cache is most of what a token would cost. Softmax is in FP32, as there.

    Args:
        module: The layer.
        query: (batch, heads, new, width).
        key, value: (batch, shared heads, total, width).
        attention_mask: (batch, 1, new, total), added to the scores.
        scaling: Of the scores; `None` for the root of the width.
        softcap: Scores stay below it (Gemma 2).
        options: Others that models pass.
    """
    torch = load("torch")
    if options.get("s_aux") is not None or options.get("position_bias") is not None:
        raise NotImplementedError("attention with sinks or position biases")
    batch, heads, new, width = query.shape
    shared = key.shape[1]
    rows = query.reshape(batch, shared, heads // shared * new, width)
    factor = width**-0.5 if scaling is None else scaling
    scores = torch.matmul(rows * factor, key.transpose(2, 3)).float()
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    total = scores.shape[-1]
    scores = scores.reshape(batch, heads, new, total) + attention_mask
    shares = torch.softmax(scores, dim=-1).to(value.dtype)
    mixed = torch.matmul(shares.reshape(batch, shared, heads // shared * new, total), value)
    return mixed.reshape(batch, heads, new, width).transpose(1, 2), None
