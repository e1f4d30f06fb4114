"""Which part of the standard library a docstring is from: heads on MiniLM's vectors.

Real English texts with real classes that every Python brings along. The heads are trained on the
full-precision vectors; on the device they get the INT8 model's.
"""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.cascade.pairs import Pair, load, outputs_of
from nearfar.errors import InvalidInput

#: Modules and packages with many docstrings that Python 3.10 to 3.13 all have.
MODULES = (
    "asyncio", "email", "tkinter", "unittest", "multiprocessing", "importlib", "logging", "http",
    "xml", "turtle", "_pydecimal", "mailbox", "inspect", "argparse", "statistics", "typing",
)  # fmt: skip
TEXTS_PER_CLASS = 150
#: Parts of the texts of each class: for the heads; the rest is the pool.
TRAINING_SHARE = 1 / 3
#: Of fewer characters a docstring says too little to be anybody's.
_MIN_CHARACTERS, _MAX_CHARACTERS = 40, 400
_BATCH = 16
NEIGHBOURS = 9


def docstrings(seed: int) -> tuple[list[str], np.ndarray, list[str]]:
    """Docstrings of the standard library by top-level module, read without importing anything.

    Returns:
        Texts, class of each, names of the classes.
    """
    root = Path(sysconfig.get_path("stdlib"))
    found: dict[str, set[str]] = {}
    seen: set[str] = set()  # what two modules say is nobody's
    for name in MODULES:
        files = sorted((root / name).rglob("*.py")) or [root / f"{name}.py"]
        theirs = {text for path in files if path.is_file() for text in _docstrings_in(path)}
        found[name] = theirs - seen
        seen |= theirs
    names = [name for name in MODULES if found[name]]
    random = np.random.default_rng(seed)
    texts: list[str] = []
    classes: list[int] = []
    for index, name in enumerate(names):
        own = sorted(found[name])
        for position in random.permutation(len(own))[:TEXTS_PER_CLASS]:
            texts.append(own[position])
            classes.append(index)
    return texts, np.array(classes), names


def _docstrings_in(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            text = " ".join((ast.get_docstring(node) or "").split())[:_MAX_CHARACTERS]
            if len(text) >= _MIN_CHARACTERS:
                found.append(text)
    return found


def heads(
    models: Path, seed: int, on_texts: Callable[[int], None] = lambda count: None
) -> list[Pair]:
    """Embed with both variants, train the heads, and ask them about the pool.

    Args:
        models: Folder of bundles with minilm in it.
        seed: Of the choice of texts.
        on_texts: Told how many more texts were embedded.

    Raises:
        InvalidInput: The bundle is missing.
        EngineError: scikit-learn is not installed.
    """
    bundle = models / "minilm"
    if not (bundle / "manifest.json").is_file():
        raise InvalidInput(
            f"There is no minilm in {models}",
            field="--models",
            fix="Make the models with `nearfar quickstart`, or name another folder: --models DIR",
        )
    texts, classes, names = docstrings(seed)
    vectors = {variant: _embed(bundle, variant, texts, on_texts) for variant in ("int8", "fp32")}
    order = np.random.default_rng(seed + 1).permutation(len(texts))
    count = int(len(texts) * TRAINING_SHARE)
    training, pool = order[:count], order[count:]
    linear = load("sklearn.linear_model").LogisticRegression(C=10.0, max_iter=2000)
    linear.fit(vectors["fp32"][training], classes[training])
    known, of = vectors["fp32"][training], classes[training]
    detail = f"{len(names)} modules, heads trained on {count} texts"
    return [
        Pair(
            name="MiniLM, linear head",
            edge=linear.predict_proba(vectors["int8"][pool]),
            cloud=linear.predict_proba(vectors["fp32"][pool]),
            truth=classes[pool],
            detail=detail,
        ),
        Pair(
            name="MiniLM, kNN head",
            edge=neighbours(vectors["int8"][pool], known, of, len(names)),
            cloud=neighbours(vectors["fp32"][pool], known, of, len(names)),
            truth=classes[pool],
            detail=f"{detail}, {NEIGHBOURS} neighbours",
        ),
    ]


def neighbours(
    vectors: np.ndarray, known: np.ndarray, classes: np.ndarray, count: int
) -> np.ndarray:
    """Class probabilities from the nearest known vectors, weighted by how near they are.

    Args:
        vectors: Unit vectors to classify, shape (rows, dimensions).
        known: Unit vectors of known class.
        classes: Their classes.
        count: How many classes there are.
    """
    cosines = vectors @ known.T
    nearest = np.argsort(-cosines, axis=-1)[:, :NEIGHBOURS]
    weights = np.exp(10.0 * np.take_along_axis(cosines, nearest, axis=-1))
    shares = np.full((len(vectors), count), 1e-6)
    for row in range(len(vectors)):
        np.add.at(shares[row], classes[nearest[row]], weights[row])
    return np.asarray(shares / shares.sum(axis=-1, keepdims=True))


def _embed(
    bundle: Path, variant: str, texts: list[str], on_texts: Callable[[int], None]
) -> np.ndarray:
    def ask(model: object) -> dict[str, np.ndarray]:
        rows = []
        for start in range(0, len(texts), _BATCH):
            batch = texts[start : start + _BATCH]
            rows.append(model.infer_raw("text", batch)["embedding"])  # type: ignore[attr-defined]
            on_texts(len(batch))
        return {"embedding": np.concatenate(rows)}

    found = outputs_of(bundle, variant, "embedding", ask)
    return np.asarray(found / np.linalg.norm(found, axis=-1, keepdims=True))
