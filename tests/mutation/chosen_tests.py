"""A pytest plugin, given with -p: runs the tests listed in a file, in its order, and says which one failed."""

import json
from pathlib import Path

import pytest
from hypothesis import Phase, settings


def pytest_addoption(parser):
    parser.addoption("--chosen", type=Path, help="a file with the ids of tests, one a line")
    parser.addoption("--verdict", type=Path, help="the file to write what happened to")


def pytest_configure(config):
    config.pluginmanager.register(_Chosen(config.getoption("--chosen"), config.getoption("--verdict")))
    # One failing example is enough: it need not be made small.
    settings.register_profile("mutation", settings.default, phases=(Phase.explicit, Phase.generate, Phase.target))
    settings.load_profile("mutation")


class _Chosen:
    def __init__(self, chosen, verdict):
        self.rank = {name: rank for rank, name in enumerate(chosen.read_text().splitlines())}
        self.path = verdict
        self.verdict = {"chosen": 0, "passed": 0, "failed": [], "not_collected": []}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config, items):
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in self.rank])
        items[:] = sorted((item for item in items if item.nodeid in self.rank), key=lambda item: self.rank[item.nodeid])
        self.verdict["chosen"] = len(items)

    def pytest_collectreport(self, report):
        if report.failed:
            self.verdict["not_collected"].append(report.nodeid)

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.verdict["failed"].append(report.nodeid)
        elif report.when == "call":
            self.verdict["passed"] += 1

    def pytest_sessionfinish(self):
        self.path.write_text(json.dumps(self.verdict))
