"""That docstrings name arguments that exist: griffe cannot tell, because Args may be grouped, as in `key, value: …`."""

from pathlib import Path

CORE = Path(__file__).parents[2] / "core" / "src"
OPTIONS = {"warn_unknown_params": False, "warn_missing_types": False}


def load(name, folder):
    import griffe  # of mkdocstrings, which only the site needs

    extensions = griffe.load_extensions("dataclasses")
    return griffe.load(name, search_paths=[str(folder)], docstring_parser="google", extensions=extensions)


def documented(module):
    for member in module.members.values():
        if not member.is_alias and (member.is_function or member.is_class or member.is_module):
            yield from [member] * bool(member.docstring and not member.is_module)
            yield from () if member.is_function else documented(member)


def strangers(found):
    """The names under Args that are neither parameters nor, of a class, attributes."""
    sections = found.docstring.parse("google", **OPTIONS)
    named = [name for each in sections if each.kind.value == "parameters" for one in each.value for name in split(one)]
    known = {parameter.name.lstrip("*") for parameter in found.parameters}
    known |= set(found.all_members) if found.is_class else set()
    return [name for name in named if name not in known]


def split(parameter):
    return [name.strip().lstrip("*") for name in parameter.name.split(",")]


def test_docstrings_name_arguments_that_exist():
    found = [*documented(load("kernelry", CORE))]
    assert len(found) > 500
    assert {each.path: strangers(each) for each in found if strangers(each)} == {}


def test_a_wrong_name_is_found(tmp_path):
    text = 'def f(key, value):\n    """Does.\n\n    Args:\n      key, valu: what it is.\n      key: more.\n    """\n'
    (tmp_path / "wrong.py").write_text(text)
    [function] = documented(load("wrong", tmp_path))
    assert strangers(function) == ["valu"]
