"""Prints what the distributions of kernelry in this environment require, and what is installed: `make dependencies`.

With `--lowest` its status is 1 unless everything installed is the lowest version that is allowed: the check of
`make test-oldest` that it tested what it says.
"""

import argparse
import importlib.metadata
import sys
from collections.abc import Iterator

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version


def requirements() -> Iterator[tuple[str, Requirement]]:
    """Each requirement of kernelry's own distributions that are installed, on something that is not one of them.

    Yields:
        the distribution that requires it, with the extra in brackets, and the requirement. What is for another Python
        is left out.
    """
    for distribution in sorted(importlib.metadata.distributions(), key=lambda found: found.name):
        if distribution.name != "kernelry" and not distribution.name.startswith("kernelry-"):
            continue
        for text in distribution.requires or ():
            requirement = Requirement(text)
            if canonicalize_name(requirement.name).split("-")[0] == "kernelry":
                continue
            extras = ["", *(distribution.metadata.get_all("Provides-Extra") or ())]
            for extra in extras:
                if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                    yield f"{distribution.name}[{extra}]" if extra else distribution.name, requirement
                    break


def installed(name: str) -> Version | None:
    """The version of a distribution in this environment; None where it is not installed."""
    try:
        return Version(importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return None


def lowest(specifier: SpecifierSet) -> Version | None:
    """The version that the range starts with; None where it has no start."""
    starts = [Version(part.version) for part in specifier if part.operator in (">=", "==", "~=")]
    return max(starts, default=None)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--lowest", action="store_true", help="fail unless the lowest versions are installed")
    arguments = parser.parse_args()
    wrong = 0
    print(f"Python {sys.version.split()[0]}")
    for owner, requirement in requirements():
        found = installed(requirement.name)
        note = ""
        if arguments.lowest and found is not None and found != lowest(requirement.specifier):
            wrong, note = wrong + 1, "  NOT THE LOWEST"
        print(f"{owner:<34} {requirement.name + str(requirement.specifier):<42} {found or 'not installed'}{note}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
