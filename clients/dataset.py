"""A sealed dataset as lazy arrays."""

from __future__ import annotations

import itertools
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from actcache.cache.head import Head
from actcache.cache.location import Location
from actcache.cache.opening import SealedRoot, read_head, read_root
from actcache.cache.store import Store, open_store
from actcache.cache.tokenizer import read_tokenizer
from actcache.clients.columns import Columns
from actcache.clients.quantised import QuantisedForm, quantised_forms
from actcache.clients.sources import Column, QuantisedSource, Source, StoredSource
from actcache.clients.summary import html_summary, printable, summary
from actcache.clients.text import Text
from actcache.clients.whole import Whole
from actcache.schemas.errors import NotFound
from actcache.schemas.plan import ModelShape
from actcache.schemas.quantised import KINDS, Damage
from actcache.schemas.root import Generation, Provenance
from actcache.schemas.sites import residual_stream

if TYPE_CHECKING:
    import zarr


class Dataset(Whole):
    """One immutable activation dataset. Opening it read its metadata alone.

    Attributes:
        url: where it is.
        sites: names of the activation sites whose values are stored as they are, in model order.
        quantised: the kinds in which each site is stored quantised, by site.
        n_tokens, n_sequences, n_documents, d_model: sizes.
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
        self._n_tokens = attributes.n_tokens
        self.n_sequences = attributes.n_sequences
        self.n_documents = attributes.n_documents
        self.d_model = attributes.d_model
        self.format = attributes.format
        self.key = attributes.generations[0].key
        self.manifest = attributes.generations[0].manifest
        self.generations: tuple[Generation, ...] = attributes.generations
        self.provenance: Provenance = attributes.generations[0].provenance
        self.model: ModelShape = self.provenance.model
        self.model_key = self.provenance.spec.model.content_hash()

    def __reduce__(self) -> tuple[Any, ...]:
        """A dataset travels as its location: without credentials, which are found anew where it arrives."""
        return _reopen, (self._store.location,)

    def source(self, name: str, kind: str | None = None) -> Source:
        """See `View`."""
        if kind is not None:
            form = self._form(name, kind)
            return QuantisedSource(self._stored(form.codes.name), self._stored(form.scales.name), form.kind, form.group)
        if name not in self._root.layouts:
            if name in self._forms:
                raise self._no_site(name)
            raise NotFound(f"{self.url}: no array {name!r}; ds.sites and ds.tokens list what there is")
        return self._stored(name)

    def _stored(self, name: str) -> StoredSource:
        return StoredSource(self._store.location, self._manifest_of(name), self._root.layouts[name])

    @cached_property
    def fields(self) -> tuple[str, ...]:
        """See `View`."""
        layouts = self._root.layouts
        return tuple(name for name in layouts if layouts[name].dimensions == ("token",))

    @cached_property
    def tokens(self) -> Columns:
        """See `View`. With `sequence_start` and `document_row` among them."""
        names = [name for name, role in self._root.attributes.arrays.items() if role.role == "token"]
        return Columns(f"{self.url}: no token array", names, lambda name: self.source(name).open().read())

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

    @property
    def residual_sites(self) -> list[str]:
        """The sites of the residual stream that the dataset has in any form: the embedding, then each block's output."""
        return [site for site in residual_stream(self.model.n_layers) if site in self.sites or site in self._forms]

    @cached_property
    def norm(self) -> Columns:
        """See `View`."""
        return Columns(f"{self.url}: no site", self.captured, lambda site: self.norm_source(site).open().read())

    def _norm_arrays(self) -> dict[str, tuple[str, ...]]:
        """The sites of each array of norms."""
        arrays, generations = self._root.attributes.arrays, self._root.attributes.generations
        return {name: generations[role.generation].captured for name, role in arrays.items() if role.role == "norm"}

    def norm_source(self, site: str) -> Source:
        """See `View`."""
        for name, sites in self._norm_arrays().items():
            if site in sites:
                return Column(self.source(name), sites.index(site))
        raise self._no_site(site)

    @cached_property
    def statistics(self) -> dict[str, dict[str, np.ndarray]]:
        """See `View`."""
        found = {}
        for site in self._root.attributes.captured:
            rows = self.source(f"statistics/{site}").open().read()
            found[site] = {"mean": rows[0], "variance": rows[1]}
        return found

    @cached_property
    def head(self) -> Head:
        """See `View`."""
        return read_head(self._store, self._root)

    @cached_property
    def tokenizer(self) -> Text:
        """See `View`. Needs the extra `actcache[text]`."""
        return Text(read_tokenizer(self._store, self._root), self.url)

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
        extras += ["tokenizer"] if self._root.attributes.tokenizer else []
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
