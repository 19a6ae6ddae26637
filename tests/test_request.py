"""`load` and `generate` inside a transformation of JAX: one line that names what to use there."""

import dataclasses
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from tiny import write_tiny

from moespec_jax.errors import RequestError
from moespec_jax.runtime.load import load
from moespec_jax.runtime.model import Model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load(str(write_tiny(tmp_path_factory.mktemp("target"))))


def of_params(model: Model, params: Any) -> Any:
    return dataclasses.replace(model, params=params).generate([[5, 6]], max_new_tokens=2).tokens_per_s


# Without the types of arguments being checked, as for a caller.
generate = inspect.unwrap(Model.generate)
CALLS: dict[str, Any] = {
    "prompts": lambda model: jax.jit(lambda ids: generate(model, ids))(jnp.zeros((1, 3), jnp.int32)),
    "ids in lists": lambda model: jax.jit(lambda i: generate(model, [[5, i]]))(6),
    "params": lambda model: jax.jit(lambda params: of_params(model, params))(model.params),
    "nothing traced": lambda model: jax.jit(lambda: model.generate("the cat"))(),
    "temperature": lambda model: jax.vmap(lambda t: generate(model, "a", temperature=t))(jnp.ones(2)),
    "gradient": lambda model: jax.grad(lambda params: of_params(model, params))(model.params),
    "scan": lambda model: jax.lax.scan(lambda c, _: (c, model.generate("a").exact), 0, length=2),
    "load": lambda model: jax.jit(lambda: load(str(model.directory)))(),
}


@pytest.mark.parametrize("call", CALLS)
def test_inside_a_transformation(model: Model, call: str) -> None:
    function = "load" if call == "load" else "generate"
    with pytest.raises(
        RequestError, match=rf"expected {function} outside of jax\.jit.*decoder\.forward.*Spec"
    ) as raised:
        CALLS[call](model)
    assert "\n" not in str(raised.value)
