"""A sealed dataset as lazy arrays."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from actcache.cache.head import Head
from actcache.cache.location import Location
from actcache.cache.opening import SealedRoot, read_head, read_root
from actcache.cache.reader import ArrayReader
from actcache.cache.store import Store, open_store
from actcache.cache.tokenizer import read_tokenizer
from actcache.clients.lazy import lazy_array
from actcache.clients.quantised import QuantisedForm, lazy_values, quantised_forms
from actcache.clients.summary import html_summary, printable, summary
from actcache.clients.text import Text
from actcache.schemas.dtypes import numpy_dtype
from actcache.schemas.errors import InvalidInput, NotFound
from actcache.schemas.plan import ModelShape
from actcache.schemas.quantised import KINDS, Damage
from actcache.schemas.root import Generation, Provenance
from actcache.schemas.sites import residual_stream

if TYPE_CHECKING:
    import dask.array as da
    import zarr


class TokenArrays(Mapping[str, np.ndarray]):
    """The small arrays of the token axis by name, read when first asked for and kept; numpy."""

    def __init__(self, store: Store, root: SealedRoot) -> None:
        self._store = store
        self._layouts = {
            name: root.layouts[name] for name, role in root.attributes.arrays.items() if role.role == "token"
        }
        self._kept: dict[str, np.ndarray] = {}

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._layouts:
            raise NotFound(f"{self._store.location}: no token array {name!r}; there is {', '.join(self._layouts)}")
        if name not in self._kept:
            array = ArrayReader(self._store, self._layouts[name]).read()
            array.flags.writeable = False
            self._kept[name] = array
        return self._kept[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layouts)

    def __len__(self) -> int:
        return len(self._layouts)

    def __repr__(self) -> str:
        return f"TokenArrays({', '.join(self._layouts)})"


class Dataset:
    """One immutable activation dataset. Opening it read its metadata alone.

    Attributes:
        url: where it is.
        sites: names of the activation sites whose values are stored as they are, in model order.
        quantised: the kinds in which each site is stored quantised, by site.
        n_tokens, n_sequences, n_documents, d_model: sizes.
        tokens: the small arrays of the token axis, a lazy mapping of numpy arrays.
        provenance: where it comes from; of what added builds stored, see `generations`.
        generations: key, manifest, sites and provenance of the first build and of each added one.
    """

    def __init__(self, store: Store, root: SealedRoot) -> None:
        self._store = store
        self._root = root
        attributes = root.attributes
        self.url = store.location.url
        self.sites: list[str] = attributes.sites
        self._forms = quantised_forms(root)
        self.quantised: dict[str, tuple[str, ...]] = {site: tuple(forms) for site, forms in self._forms.items()}
        self.n_tokens = attributes.n_tokens
        self.n_sequences = attributes.n_sequences
        self.n_documents = attributes.n_documents
        self.d_model = attributes.d_model
        self.format = attributes.format
        self.key = attributes.generations[0].key
        self.manifest = attributes.generations[0].manifest
        self.generations: tuple[Generation, ...] = attributes.generations
        self.provenance: Provenance = attributes.generations[0].provenance
        self.model: ModelShape = self.provenance.model
        self.tokens: Mapping[str, np.ndarray] = TokenArrays(store, root)

    def __getitem__(self, name: str) -> da.Array:
        """A site, or any other array of the dataset, as a lazy Dask array; a site's values as float32.

        A site's shape is (token, d_model), one Dask chunk a shard. Slices read only the chunks that they touch.

        Raises:
            NotFound: no array of that name, or a site that is stored in quantised form alone: `site` gives that.
        """
        return self.site(name) if name in self.sites or name in self._forms else self._array(name, None)

    def __contains__(self, name: object) -> bool:
        """Whether there is an array of that name."""
        return name in self._root.layouts

    def __iter__(self) -> Iterator[str]:
        """The sites, in model order."""
        return iter(self.sites)

    def __reduce__(self) -> tuple[Any, ...]:
        """A dataset travels as its location: without credentials, which are found anew where it arrives."""
        return _reopen, (self._store.location,)

    def site(self, name: str, dtype: Literal["float32", "stored", "int8", "fp8"] = "float32") -> da.Array:
        """A site as a lazy Dask array (token, d_model), float32 or as stored, or the values of a quantised form, float32.

        numpy sums float16 and bfloat16 in their own precision, which is silently wrong; hence float32 by default. The values of
        a quantised form differ from the exact ones by what `damage` tells, so they are given to who asks for them alone.

        Raises:
            NotFound: no site of that name, or it is not stored in that form.
            InvalidInput: another dtype.
        """
        if dtype in KINDS:
            form = self._form(name, dtype)
            return lazy_values(self._store.location, self._manifest_of(form.codes.name), form)
        if dtype not in ("float32", "stored"):
            raise InvalidInput(f"dtype {dtype!r} is none of 'float32', 'stored', {', '.join(map(repr, KINDS))}")
        if name not in self.sites:
            raise self._no_site(name)
        return self._array(name, None if dtype == "stored" else numpy_dtype("float32"))

    def _array(self, name: str, dtype: np.dtype | None) -> da.Array:
        if name not in self._root.layouts:
            raise NotFound(f"{self.url}: no array {name!r}; ds.sites and ds.tokens list what there is")
        return lazy_array(self._store.location, self._manifest_of(name), self._root.layouts[name], dtype)

    def _manifest_of(self, name: str) -> str:
        """The manifest of the build that stored an array, which tells it from one of the same name made anew."""
        return self.generations[self._root.attributes.arrays[name].generation].manifest

    def damage(self, name: str, kind: str) -> Damage | None:
        """What quantising did to a site, measured over every token when the dataset was built; None if it is not recorded.

        Raises:
            NotFound: no site of that name, or it is not stored in that form.
        """
        return self._form(name, kind).damage

    def _form(self, name: str, kind: str) -> QuantisedForm:
        if name not in self.sites and name not in self._forms:
            raise self._no_site(name)
        forms = self._forms.get(name, {})
        if kind not in forms:
            there = ", ".join(forms) or "no quantised form"
            raise NotFound(
                f"{self.url}: site {name!r} is not stored as {kind!r}; there is {there} (ds.quantised lists all)"
            )
        return forms[kind]

    def _no_site(self, name: str) -> NotFound:
        if name in self._forms:
            kinds = list(self._forms[name])
            return NotFound(
                f"{self.url}: site {name!r} is stored in quantised form alone ({', '.join(kinds)}); "
                f"ds.site({name!r}, dtype={kinds[0]!r}) gives its values to within that damage"
            )
        sites = self.sites or list(self._forms)
        near = ", ".join(sites[:4]) + (", …" if len(sites) > 4 else "")
        listed = "ds.sites" if self.sites else "ds.quantised"
        return NotFound(f"{self.url}: no site {name!r}; there is {near} ({listed} lists all)")

    @property
    def residual_sites(self) -> list[str]:
        """The sites of the residual stream that the dataset has in any form: the embedding, then each block's output."""
        return [site for site in residual_stream(self.model.n_layers) if site in self.sites or site in self._forms]

    @property
    def resid(self) -> da.Array:
        """The whole residual stream as a lazy Dask array (layer, token, d_model), float32; index 0 is the embedding.

        Raises:
            NotFound: the dataset lacks one of its states.
        """
        import dask.array as da

        wanted = residual_stream(self.model.n_layers)
        missing = [site for site in wanted if site not in self.sites]
        if missing:
            if missing[0] in self._forms:
                raise self._no_site(missing[0])
            raise NotFound(f"{self.url}: ds.resid needs every residual state, and {missing[0]!r} was not stored")
        stacked: da.Array = da.stack([self.site(site) for site in wanted])  # type: ignore[no-untyped-call]
        return stacked

    @property
    def sequence_start(self) -> np.ndarray:
        """Row splits (n_sequences + 1), int64: sequence i is tokens [sequence_start[i], sequence_start[i+1])."""
        return self.tokens["sequence_start"]

    @cached_property
    def norm(self) -> dict[str, np.ndarray]:
        """L2 norm of every vector by site, each (token,), float32: as stored, or as it was before it was quantised alone."""
        columns: dict[str, np.ndarray] = {}
        for name, role in self._root.attributes.arrays.items():
            if role.role == "norm":
                layout = self._root.layouts[name]
                rows = ArrayReader(self._store, layout).read()
                sites = self._root.attributes.generations[role.generation].captured
                columns |= {site: rows[:, index] for index, site in enumerate(sites)}
        return columns

    @cached_property
    def statistics(self) -> dict[str, dict[str, np.ndarray]]:
        """Mean and variance per dimension by site, each (d_model,), float64."""
        found = {}
        for site in self._root.attributes.captured:
            rows = ArrayReader(self._store, self._root.layouts[f"statistics/{site}"]).read()
            found[site] = {"mean": rows[0], "variance": rows[1]}
        return found

    @cached_property
    def head(self) -> Head:
        """Final norm and unembedding, evaluated in numpy.

        Raises:
            NotFound: the dataset was built without a head.
        """
        return read_head(self._store, self._root)

    @cached_property
    def tokenizer(self) -> Text:
        """The tokenizer, which makes text of token ids; needs the extra `actcache[text]`.

        Raises:
            NotFound: the dataset holds none.
            Corrupt: one of its files is missing or damaged.
        """
        return Text(read_tokenizer(self._store, self._root), self.url)

    def rows(self, name: str, start: int, stop: int, quantised: str | None = None) -> np.ndarray:
        """Rows [start, stop) of an array at once, without Dask; in the stored dtype.

        With `quantised`, a kind, the values of that form of a site, float32.

        Raises:
            NotFound: no array of that name, or no such form of it.
            IndexError: the range is not within it.
        """
        if quantised is not None:
            return self._form(name, quantised).reader(self._store).read(start, stop)
        if name not in self._root.layouts:
            if name in self._forms:
                raise self._no_site(name)
            raise NotFound(f"{self.url}: no array {name!r}; ds.sites and ds.tokens list what there is")
        return ArrayReader(self._store, self._root.layouts[name]).read(start, stop)

    @property
    def zarr(self) -> zarr.Group:
        """The dataset as a zarr-python group, read-only."""
        from actcache.clients.interop import zarr_group

        return zarr_group(self._store)

    @property
    def dtype(self) -> str:
        """The stored dtype of the sites, or dtypes where builds differ; the kinds of their quantised forms where there is no other."""
        if not self.sites:
            return ", ".join(kind for kind in KINDS if any(kind in kinds for kinds in self.quantised.values()))
        return ", ".join(dict.fromkeys(self.dtypes.values()))

    @property
    def dtypes(self) -> dict[str, str]:
        """The stored dtype by site."""
        return {site: self._root.layouts[site].dtype for site in self.sites}

    @property
    def raw_bytes(self) -> int:
        """Bytes of all sites in every form, not compressed."""
        layouts = [self._root.layouts[site] for site in self.sites]
        layouts += [layout for forms in self._forms.values() for f in forms.values() for layout in (f.codes, f.scales)]
        return sum(layout.rows * layout.row_bytes for layout in layouts)

    def _damage_facts(self) -> dict[str, str]:
        """Of each kind, the site that quantising did the most damage to."""
        facts: dict[str, str] = {}
        for kind in KINDS:
            found = {site: d for site, forms in self._forms.items() if kind in forms and (d := forms[kind].damage)}
            if not found:
                continue
            worst = max(found, key=lambda site: found[site].relative_error)
            said = f"{len(found)} sites; worst relative error {found[worst].relative_error:.2g} ({worst})"
            kl = {site: d.kl for site, d in found.items() if d.kl is not None}
            if kl:
                most = max(kl, key=kl.__getitem__)
                said += f", worst KL {kl[most]:.2g} nats ({most})"
            else:
                said += f", KL {next(iter(found.values())).kl_note}"
            facts[kind] = said
        return facts

    def facts(self) -> dict[str, str]:
        """What a summary shows, in order."""
        labels, spec = self.provenance.labels, self.provenance.spec
        revision = f" @ {labels.revision}" if labels.revision else ""
        sites = self._root.attributes.captured
        shown = [sites[0], "…", sites[-1]] if len(sites) > 3 else sites
        only = "" if self.sites else ", in quantised form alone"
        outputs = (generation.provenance.spec.outputs for generation in self.generations)
        extras = [*itertools.chain(*outputs), *(["head"] if spec.head else [])]
        facts = {
            "url": self.url,
            "model": f"{labels.model}{revision} ({spec.model.family}, {self.model.n_layers} layers × {self.d_model})",
            "corpus": ", ".join(labels.corpus),
            "tokens": f"{self.n_tokens:,} in {self.n_sequences:,} sequences of at most {spec.context}, {self.n_documents:,} documents",
            "sites": f"{len(sites)}: {' '.join(shown)}{only}",
            "dtype": f"{self.dtype} (computed in {', '.join(self._compute_dtypes())})",
            **self._damage_facts(),
            "also": ", ".join(extras) or "nothing",
            "size": f"{self.raw_bytes / 1e9:,.2f} GB of activations, not compressed",
            "key": self.key,
        }
        return {name: printable(value) for name, value in facts.items()}

    def _compute_dtypes(self) -> list[str]:
        return list(dict.fromkeys(part.provenance.spec.execution.compute_dtype for part in self.generations))

    def __repr__(self) -> str:
        return summary(self.facts())

    def _repr_html_(self) -> str:
        return html_summary(self.facts())


def _reopen(location: Location) -> Dataset:
    store = open_store(location)
    return Dataset(store, read_root(store))
