"""A user's mistake raised in another process keeps its message and its code."""

from collections.abc import Callable
from typing import Any

import pytest
import ray

from transfgu.errors import UserError
from transfgu.runtime import ray_internals
from transfgu.runtime.failures import find_user_error, raises_user_errors


def refuse() -> None:
    raise UserError("another run is writing it: wait", code="run-locked")


class Refused:
    def __init__(self) -> None:
        refuse()

    def ready(self) -> None: ...


@ray.remote(num_cpus=0)
def in_actor_of_task() -> None:
    in_actor()


def in_task() -> None:
    ray.get(ray.remote(num_cpus=0)(refuse).remote())


def in_actor() -> None:
    actor: Any = ray.remote(num_cpus=0)(Refused).remote()
    ray.get(actor.ready.remote())


def in_map() -> None:
    def refuse_row(row: dict[str, Any]) -> dict[str, Any]:
        refuse()
        return row

    with ray_internals.data_context():
        data = ray.data.range(1).map(refuse_row)
    data.materialize()  # Ray Data adds advice on retries to the message


@pytest.mark.ray
@pytest.mark.parametrize(
    "go",
    [in_task, in_actor, lambda: ray.get(in_actor_of_task.remote()), in_map],
    ids=["task", "actor", "actor of a task", "map of Ray Data"],
)
def test_a_mistake_in_another_process_keeps_its_code(go: Callable[[], None], ray_cluster: None) -> None:
    with pytest.raises(ray.exceptions.RayError) as raised:
        go()
    found = find_user_error(raised.value)
    assert found is not None
    assert found.line == "another run is writing it: wait [run-locked]"
    with pytest.raises(UserError) as plain, raises_user_errors():
        raise raised.value
    assert type(plain.value) is UserError
    assert plain.value.line == found.line
    assert plain.value.__cause__ is None


def test_other_errors_pass_as_they_are() -> None:
    lost, mistake = RuntimeError("node lost"), UserError("no such file: name another", code="file-missing")
    for error in (lost, mistake):
        with pytest.raises(type(error)) as raised, raises_user_errors():
            raise error
        assert raised.value is error
