"""Load a model with its tokenizer and what drafts for it, a head or a drafter by name: `moespec_jax.load`."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from moespec_jax.checkpoint.generation_config import read_sampling
from moespec_jax.checkpoint.head.read import AnyLoaded, load_any_draft, share_embedding, share_lm_head
from moespec_jax.checkpoint.hub import locate
from moespec_jax.checkpoint.placement import (
    Placement,
    decoder_placement,
    head_placement,
    place_head,
    place_output,
    with_repeated_heads,
)
from moespec_jax.checkpoint.quantized.detect import stored_format
from moespec_jax.checkpoint.read import load_config, load_parameters
from moespec_jax.checkpoint.tokenizer import load_tokenizer, read_stop_ids
from moespec_jax.config import DecoderConfig
from moespec_jax.errors import CheckpointError, RequestError, wrong_type
from moespec_jax.nn.backend import BACKENDS, Backend, default_backend
from moespec_jax.nn.decoder import Decoder
from moespec_jax.nn.quantization import QUANTIZATIONS, Quantization
from moespec_jax.parallel.mesh import MeshConfig, adopt_mesh, best_mesh, make_mesh
from moespec_jax.runtime.drafters import NamedDraft, named_draft
from moespec_jax.runtime.model import Model
from moespec_jax.runtime.programs import Programs
from moespec_jax.runtime.request import check_not_traced, check_types
from moespec_jax.status_line import showing

DEMO_TARGET = str(Path(__file__).parent.parent / "demo" / "target")
DEMO_DRAFT = str(Path(__file__).parent.parent / "demo" / "draft")


@showing("loading the model")
def load(
    model: str | os.PathLike[str] = DEMO_TARGET,
    draft_model: str | os.PathLike[str] | None = None,
    *,
    revision: str | None = None,
    draft_revision: str | None = None,
    draft_boundaries: tuple[int, ...] | None = None,
    offline: bool = False,
    dtype: DTypeLike | None = None,
    backend: Backend | None = None,
    quantization: Quantization | None = None,
    mesh: MeshConfig | Mesh | Literal["auto"] | None = None,
    progress: bool = False,
    check: Callable[[DecoderConfig], object] | None = None,
) -> Model:
    """Load a model, and what drafts for it; without arguments, the embedded pair.

    Args:
        model: target: a directory (Hugging Face, or converted to orbax) or a Hugging Face Hub id.
        draft_model: EAGLE-3, DFlash or DSpark head: a directory or a hub id. Without one, "ngram" drafts from the text
            so far, and "self:K" with the target and K experts a token. "none" loads none; None loads the embedded head
            for the embedded target, and none for any other.
        revision: branch, tag or commit of the target's hub repository.
        draft_revision: the same of the head's.
        draft_boundaries: boundaries of the target whose hidden states the head reads, in place of those in its files.
        offline: load hub repositories from the local cache only.
        dtype: of weights and activations; by default float32 on CPU, which would convert bfloat16 weights at every
            use, and bfloat16 elsewhere.
        backend: expert compute and attention; by default the platform's.
        quantization: of the routed experts, which changes the output slightly; "mxfp4" does not change experts that
            are published in MXFP4.
        mesh: over which model and head are sharded: sizes of one on the first devices; "auto" chooses sizes for all
            devices; or a mesh whose axes are among `data`, `expert` and `tensor`, in any order. With several processes,
            every one must call `load`.
        progress: show progress bars.
        check: called with the model's config before weights are read; it may raise.

    Raises:
        CheckpointError: the model or head is missing, damaged or not supported, or the head does not fit the model.
        RequestError: an argument has a wrong type, the model cannot be sharded over the mesh, there are too few
            devices, or the call is inside a transformation of JAX.
    """
    check_not_traced("load")
    check_types(
        model=model, draft_model=draft_model, revision=revision, draft_revision=draft_revision,
        draft_boundaries=draft_boundaries, backend=backend, check=check,
    )  # fmt: skip
    model, draft_model = os.fspath(model), None if draft_model is None else os.fspath(draft_model)
    if quantization is not None and quantization not in QUANTIZATIONS:
        raise RequestError(f"expected a quantization of {', '.join(QUANTIZATIONS)}; got {quantization!r}")
    directory = locate(model, revision, offline, progress)
    config = load_config(directory)
    if check is not None:
        check(config)
    placement = None if mesh is None else _placement(config, mesh)
    device = jax.devices()[0] if placement is None else placement.mesh.devices.flat[0]
    backend = backend or _backend(placement, device)
    if device.platform == "gpu" and not backend.supported(device):
        raise CheckpointError(f"expected a back-end that runs on {device.device_kind}; {backend.name} does not")
    if placement is not None and backend.layout == "per_expert":
        raise RequestError(f"expected a back-end whose experts can be sharded over a mesh; got {backend.name}")
    kind = _dtype(dtype, device.platform)
    if draft_model is None:
        draft_model = DEMO_DRAFT if model == DEMO_TARGET else "none"
    draft = None if draft_model == "none" else named_draft(draft_model, config)
    if draft is not None and (draft_revision is not None or draft_boundaries is not None):
        raise RequestError(f"expected a draft head to set a revision or boundaries of; {draft.name} has no files")
    if draft is None and draft_model != "none":
        # The head is small: if it does not fit, this is found before the model's weights are read.
        draft_directory = locate(draft_model, draft_revision, offline, progress, torch_archives=True)
        draft = load_any_draft(draft_directory, config, kind, name=draft_model, boundaries=draft_boundaries)
        draft = draft if placement is None else _shard_draft(draft, placement)
    tokenizer, stop_ids, sampling = load_tokenizer(directory), read_stop_ids(directory), read_sampling(directory)
    params = load_parameters(directory, config, backend, kind, placement, progress, quantization)
    draft = draft if draft is None or isinstance(draft, NamedDraft) else _share(draft, params, placement)
    programs = Programs(None if placement is None else placement.mesh)
    config = config if placement is None else with_repeated_heads(config, placement)
    stored = stored_format(directory)
    return Model(
        config, params, backend, kind, tokenizer, stop_ids, directory, draft, programs, quantization, sampling,
        checkpoint_format=None if stored is None else stored.name,
    )  # fmt: skip


def _placement(config: DecoderConfig, mesh: MeshConfig | Mesh | Literal["auto"]) -> Placement:
    try:
        if isinstance(mesh, Mesh):
            return decoder_placement(config, adopt_mesh(mesh))
        if not isinstance(mesh, MeshConfig) and not (isinstance(mesh, str) and mesh == "auto"):
            raise wrong_type("mesh", 'a MeshConfig, a jax.sharding.Mesh or "auto"', mesh)
        sizes = mesh if isinstance(mesh, MeshConfig) else best_mesh(config, len(jax.devices()))
        return decoder_placement(config, make_mesh(sizes))
    except ValueError as error:
        raise RequestError(str(error)) from None


def _dtype(dtype: DTypeLike | None, platform: str) -> jnp.dtype:
    """Find a dtype by name or type; None is the platform's default."""
    try:
        return jnp.dtype(dtype or ("float32" if platform == "cpu" else "bfloat16"))
    except TypeError:
        raise wrong_type("dtype", "float32, bfloat16 or float16", dtype) from None


def _backend(placement: Placement | None, device: object) -> Backend:
    """Choose the device's back-end; on a CPU with a mesh another one, since the CPU's has one array per expert."""
    preferred = default_backend(device)
    return BACKENDS["slots"] if placement is not None and preferred.layout == "per_expert" else preferred


def _share(draft: AnyLoaded, params: Decoder, placement: Placement | None) -> AnyLoaded:
    """Share the target's embedding and output matrix with a head that has the same embedding, or no output matrix."""
    if draft.head.lm_head is None:
        output = params.embed if params.lm_head is None else params.lm_head
        draft = share_lm_head(draft, output if placement is None else place_output(output, draft.head, placement.mesh))
    return share_embedding(draft, params.embed)


def _shard_draft(draft: AnyLoaded, placement: Placement) -> AnyLoaded:
    head = head_placement(draft.config, placement.mesh)
    config: Any = with_repeated_heads(draft.config, head)
    return draft._replace(config=config, head=place_head(draft.head, config, head))
