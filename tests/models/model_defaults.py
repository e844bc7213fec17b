"""Writes the defaults of every model type, as transformers has them, for the keys that `kernelry.models` reads.

`make model-defaults` runs it; a test compares what it makes with the file.
"""

import ast
import dataclasses
import json
from pathlib import Path

import kernelry.models
from kernelry.models.families import families, text_families

PACKAGE = Path(__file__).parents[2] / "core" / "src" / "kernelry" / "models"
FILE = PACKAGE / "defaults.json"
READERS = ("encoding.py", "keys.py", "patterns.py", "rules.py", "layerwise.py", "reading.py", "families/*.py")
MODULES = sorted(path for pattern in READERS for path in PACKAGE.glob(pattern))


def words_of_the_reader():
    """Every text in the modules that read configs: the names of keys are among them."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in MODULES]
    nodes = (node for tree in trees for node in ast.walk(tree))
    return {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}


def defaults_of(config_class, words):
    """The defaults of a class's fields, and the names that it gives to common keys."""
    names = {common: own for common, own in config_class.attribute_map.items() if {common, own} & words}
    wanted = words | set(names.values())
    found = {}
    for field in dataclasses.fields(config_class):
        if field.name in wanted and field.default is not dataclasses.MISSING:
            found[field.name] = field.default
        elif field.name in wanted and field.default_factory is not dataclasses.MISSING:
            found[field.name] = field.default_factory()
    plain = {name: value for name, value in found.items() if name != "model_type" and is_plain(value)}
    return {"defaults": plain, **({"names": names} if names else {})}


def is_plain(value):
    return value is None or isinstance(value, bool | int | float | str | list | tuple | dict)


def current():
    """What the file should hold with the installed transformers."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    words = words_of_the_reader()
    types = sorted({*families(), *(inner for inner, _ in text_families().values())})
    return {
        "transformers": transformers.__version__,
        "types": {name: defaults_of(CONFIG_MAPPING[name], words) for name in types if name in CONFIG_MAPPING},
    }


def as_text(data):
    """JSON with one model type a line, so that a difference is readable."""
    lines = [f"    {json.dumps(name)}: {json.dumps(row, sort_keys=True)}" for name, row in data["types"].items()]
    body = ",\n".join(lines)
    return f'{{\n  "transformers": {json.dumps(data["transformers"])},\n  "types": {{\n{body}\n  }}\n}}\n'


if __name__ == "__main__":
    if not PACKAGE.samefile(Path(kernelry.models.__file__).parent):
        raise SystemExit(f"kernelry is imported from {kernelry.__file__}, which is not this checkout.")
    FILE.write_text(as_text(current()), encoding="utf-8")
