"""The public face: what `import toruslab` gives, and what it does not load."""

import inspect
import subprocess
import sys

import pytest

import toruslab


def test_import_loads_no_arrays():
    """In a fresh interpreter: this one has loaded JAX."""
    code = "import sys, toruslab; sys.exit(any(m in sys.modules for m in ('jax', 'numpy', 'rich')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", toruslab.__all__)
def test_every_name_is_there_and_documented(name):
    value = getattr(toruslab, name)
    assert name in dir(toruslab)
    if callable(value):
        assert inspect.getdoc(value)


def test_names_for_the_type_checker_are_those_at_run_time():
    source = inspect.getsource(toruslab).split("if TYPE_CHECKING:")[1].split("__version__")[0]
    imported = {line.split(" import ")[1].split(" as ")[-1] for line in source.strip().splitlines()}
    assert imported | {"__version__"} == set(toruslab.__all__)


@pytest.mark.parametrize(
    ("name", "hint"),
    [("estimat", "; did you mean 'estimate'?"), ("Pont", "; did you mean 'Point'?"), ("q", "; it has LAYOUTS, Point")],
)
def test_unknown_names_say_the_nearest(name, hint):
    with pytest.raises(AttributeError) as refused:
        getattr(toruslab, name)
    assert str(refused.value).startswith(f"module 'toruslab' has no attribute {name!r}{hint}")


def test_a_name_of_the_face_is_its_rooms():
    from toruslab.partitioning.layouts.catalogue import LAYOUTS

    assert toruslab.LAYOUTS is LAYOUTS
