"""Refusal of gradients where a back-end has none: one line that names the back-end that has them, in place of JAX's own
error from inside a loop or a kernel.

A loop whose length depends on the routing has derivatives in forward mode only, a kernel has none. Both are marked by
an identity that costs nothing in a compiled program.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array

from moespec_jax.config import Activation
from moespec_jax.errors import RequestError
from moespec_jax.nn.moe import ExpertCompute
from moespec_jax.nn.routing import Routing

BuildCompute = Callable[[Activation], ExpertCompute]


def loop(backend: str, build: BuildCompute) -> BuildCompute:
    """Mark an expert compute whose loops have no reverse mode: `jax.grad` raises `RequestError`."""

    def marked(activation: Activation) -> ExpertCompute:
        compute = build(activation)

        def run(experts: object, layer: int | Array, x: Array, routing: Routing) -> Array:
            # The backward pass begins at the output, and so meets the mark before the loop.
            return _loop.bind(compute(experts, layer, x, routing), backend=backend)

        return run

    return marked


def kernel(backend: str, build: BuildCompute) -> BuildCompute:
    """Mark an expert compute that is a kernel: every derivative raises `RequestError`."""

    def marked(activation: Activation) -> ExpertCompute:
        compute = build(activation)

        def run(experts: object, layer: int | Array, x: Array, routing: Routing) -> Array:
            experts, x, routing = kernel_operands(backend, (experts, x, routing))
            return compute(experts, layer, x, routing)

        return run

    return marked


def kernel_operands(backend: str, operands: Any) -> Any:
    """Mark the arrays among the operands of a kernel."""
    return jax.tree.map(lambda x: _kernel.bind(x, backend=backend) if isinstance(x, jax.Array) else x, operands)


def _refuse(backend: str) -> RequestError:
    return RequestError(
        "expected a back-end with gradients: load(..., backend=moespec_jax.BACKENDS['dense']);"
        f" {backend!r} computes experts forward only"
    )


def _identity(name: str) -> Primitive:
    """Make a primitive that returns its operand."""
    primitive = Primitive(name)
    primitive.def_impl(lambda x, *, backend: x)
    primitive.def_abstract_eval(lambda x, *, backend: x)
    mlir.register_lowering(primitive, lambda context, x, *, backend: [x])
    batching.defvectorized(primitive)
    return primitive


def _refuse_transpose(cotangent: Any, x: Any, *, backend: str) -> Any:
    raise _refuse(backend)


def _refuse_jvp(primals: Any, tangents: Any, *, backend: str) -> Any:
    raise _refuse(backend)


_loop, _kernel = _identity("loop_without_reverse_mode"), _identity("kernel_without_derivatives")
ad.deflinear2(_loop, _refuse_transpose)
ad.primitive_jvps[_kernel] = _refuse_jvp
