"""Whether a root's arrays fit each other, so that nobody who reads them has to ask again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from actcache.schemas.array import ArrayLayout
from actcache.schemas.canonical import is_sha256
from actcache.schemas.dtypes import ACTIVATION_DTYPES
from actcache.schemas.grid import token_layouts
from actcache.schemas.outputs import output_shapes
from actcache.schemas.quantised import quantised_problems
from actcache.schemas.root import RootAttributes
from actcache.schemas.sites import residual_stream
from actcache.schemas.tokenizer import tokenizer_problems

MAX_COUNT = 1 << 48


def inconsistency(root: RootAttributes, layouts: Mapping[str, ArrayLayout]) -> str | None:
    """The first thing about a root that cannot be, in words, or None."""
    counts = (root.n_tokens, root.n_sequences, root.n_documents, root.d_model)
    if not all(1 <= count <= MAX_COUNT for count in counts):
        return "a count is not a whole positive number in bounds"
    if not root.generations or not all(generation.captured for generation in root.generations):
        return "no generation, or one of no site; the dataset was not sealed by actcache"
    if len(set(root.captured)) != len(root.captured):
        return "a site is named twice"
    return next(_problems(root, layouts), None)


def _problems(root: RootAttributes, layouts: Mapping[str, ArrayLayout]) -> Iterator[str]:
    yield from _of_generations(root)
    yield from tokenizer_problems(root.tokenizer)
    of_tokens = root.generations[0].provenance.spec.corpus.kind != "items"
    for name, wanted in token_layouts(root.n_tokens, root.n_sequences, root.n_documents, of_tokens).items():
        yield from _differs(name, layouts, wanted.shape, (wanted.dtype,))
    stream = set(residual_stream(min(root.generations[0].provenance.model.n_layers, len(root.captured))))
    exact, widths = set(root.sites), {}
    for site in root.captured:
        layout = layouts.get(site if site in exact else f"statistics/{site}")
        widths[site] = width = layout.shape[-1] if layout is not None and site not in stream else root.d_model
        if site in exact:
            yield from _differs(site, layouts, (root.n_tokens, width), ACTIVATION_DTYPES)
        elif not any(role.role == "quantised" and role.of == site for role in root.arrays.values()):
            yield f"site {site!r} is stored in no form"
        yield from _differs(f"statistics/{site}", layouts, (2, width), ("float64",))
    yield from quantised_problems(root.arrays, layouts, root.n_tokens, widths)
    for name, role in root.arrays.items():
        if role.role == "norm":
            sites = root.generations[role.generation].captured
            yield from _differs(name, layouts, (root.n_tokens, len(sites)), ("float32",))
    for name, shape, dtype in output_shapes(layouts, root.n_tokens):
        yield from _differs(name, layouts, shape, (dtype,))


def _of_generations(root: RootAttributes) -> Iterator[str]:
    """What is wrong with the hashes that become keys, and with what arrays say of their generation."""
    for number, generation in enumerate(root.generations):
        if not is_sha256(generation.key) or not is_sha256(generation.manifest):
            yield f"key or manifest of generation {number} is no SHA-256"
    if len({generation.key for generation in root.generations}) != len(root.generations):
        yield "two generations have the same key"
    for name, role in root.arrays.items():
        if not 0 <= role.generation < len(root.generations):
            yield f"array {name!r} belongs to generation {role.generation}, which there is not"
    norms = sorted(role.generation for role in root.arrays.values() if role.role == "norm")
    if norms != list(range(len(root.generations))):
        yield "there is not one array of norms for each generation"


def _differs(
    name: str, layouts: Mapping[str, ArrayLayout], shape: tuple[int, ...], dtypes: tuple[str, ...]
) -> Iterator[str]:
    layout = layouts.get(name)
    if layout is None:
        yield f"array {name!r} is missing"
    elif layout.shape != shape or layout.dtype not in dtypes:
        yield f"array {name!r} is {layout.dtype} {layout.shape}, not {' or '.join(dtypes)} {shape}"
