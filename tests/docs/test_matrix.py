"""The interactive matrix shows exactly what kernelry.explain says, and the tables of support what kernels declare."""

import json
import random
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import kernelry
from kernelry import cli
from kernelry.plugin import AtomKind, Feature
from kernelry.resolution.telling import answer_of

SITE = Path(__file__).parents[2] / "docs" / "site"
sys.path.append(str(SITE))

import choices  # noqa: E402
import matrix as exporting  # noqa: E402
import support  # noqa: E402

SAMPLE = 150
"""Cells that are computed again."""
SEED = 29
STATES = ("serves", "reserved", "refuses", "elsewhere")


@pytest.fixture(scope="module")
def data(site):
    import urllib.request

    with urllib.request.urlopen(f"{site}/assets/matrix.json", timeout=10) as answer:
        return json.load(answer)


@pytest.fixture
def open_matrix(open_page):
    """Like `open_page`, once the answer is there."""

    def opening(path, **size):
        page = open_page(path, **size)
        page.wait_for_selector(".matrix-result > *")
        return page

    return opening


def read(data, number):
    """An answer with its texts, read as docs/site/matrix.py describes it."""
    rule, plan, others, advice = data["answers"][number]
    line = data["lines"].__getitem__
    found = {"rule": line(rule), "advice": None if advice < 0 else line(advice), "plan": None}
    if plan >= 0:
        kernel, tiling, source, together, adapters, notes = data["plans"][plan]
        steps = list(zip(adapters[::2], adapters[1::2], strict=True))
        found["plan"] = (kernel, tiling, source, together, steps, [*map(line, notes)])
    rows = (data["candidates"][index] for index in data["others"][others])
    found["others"] = [(name, STATES[state], [*map(line, lines)]) for name, state, *lines in rows]
    return found


def told(request):
    """The same of kernelry.explain, in this process: nothing is measured, and no variable is set."""
    resolution = kernelry.explain(request, changes=False)
    found = {"rule": resolution.rule, "advice": resolution.advice, "plan": None}
    if resolution.plan is not None:
        plan, winner = resolution.plan, resolution.winner
        steps = [(step.adapter.name, str(step.cost)) for step in plan.steps]
        together = str(plan.cost) if len(steps) > 1 else ""
        tiling = str(plan.tiling) if plan.tiling.values else ""
        found["plan"] = (plan.kernel.name, tiling, plan.tiling.source or "", together, steps, [*winner.notes])
    others = [candidate for candidate in resolution.candidates if candidate.name != resolution.kernel]
    found["others"] = [(c.name, state(c), [*answer_of(resolution, c)]) for c in others]
    return found


def state(candidate):
    if not candidate.refusals:
        return "serves"
    if candidate.reservations:
        return "reserved"
    return "elsewhere" if any(refusal.code.value == "platform" for refusal in candidate.refusals) else "refuses"


def test_the_exported_answers_are_those_of_explain(data):
    cells = [
        (block, target, mask, length)
        for block in choices.blocks()
        for target in choices.TARGETS
        for mask in block.masks
        for length in block.lengths
    ]
    numbers = [number for block in data["grid"] for number in block["cells"]]
    assert len(numbers) == len(cells) > 10_000
    for place in random.Random(SEED).sample(range(len(cells)), SAMPLE):
        block, target, mask, length = cells[place]
        request = choices.request_of(target, block.mode, length, mask, block.options)
        assert read(data, numbers[place]) == told(request), str(request)


def test_the_exported_answers_about_models_are_those_of_the_command(data, capsys):
    for model in random.Random(SEED).sample(data["models"], 3):
        for cache in data["caches"]:
            command = f"explain --model {model['name']} --target tpu:v6e --q-len 8192 {cache['arguments']} --json"
            rows = run(command, capsys)["rows"]
            place = len(data["model_lengths"]) * data["targets"].index("tpu:v6e") + data["model_lengths"].index(8192)
            shown = [(kind, call, read(data, cells[place])) for kind, call, cells in model["rows"][cache["name"]]]
            assert [(row["kind"], row["call"]) for row in rows] == [(kind, call) for kind, call, _ in shown]
            kernels = [row["targets"]["tpu:v6e"]["plan"]["kernel"] for row in rows]
            assert kernels == [found["plan"][0] for *_, found in shown]


def run(command, capsys):
    """What the command prints with --json."""
    arguments = shlex.split(command)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["kernelry", *arguments])
        status = cli.main()
    output = capsys.readouterr()
    assert status == 0, output.err
    return json.loads(output.out)


def test_the_matrix_is_small_enough_to_load(site, data):
    import gzip
    import urllib.request

    with urllib.request.urlopen(f"{site}/assets/matrix.json", timeout=10) as answer:
        text = answer.read()
    assert len(text) < 2_000_000
    assert len(gzip.compress(text)) < 250_000


def test_commands_of_the_page_ask_the_same_request(open_matrix, data, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = open_matrix("matrix/")
    asked = [block for block in choices.blocks() if len(block.options) < 2]
    asked += random.Random(SEED).sample([block for block in choices.blocks() if len(block.options) == 2], 10)
    chosen = [
        {"target": choices.TARGETS[i % 8], "mode": block.mode, "length": 8192, "with": [*block.options], "mask": mask}
        for i, block in enumerate(asked)
        for mask in (block.masks if not block.options else block.masks[:1])
    ]
    commands = page.evaluate(
        """async (chosen) => {
          const { Matrix } = await import("../assets/matrix-answers.js");
          const data = await (await fetch("../assets/matrix.json")).json();
          const matrix = new Matrix(data);
          return chosen.map((choice) => matrix.command(choice));
        }""",
        chosen,
    )
    for choice, command in zip(chosen, commands, strict=True):
        *before, asking = command.splitlines()
        for line in before:
            subprocess.run(["sh", "-c", line], check=True)
        found = run(asking.removeprefix("kernelry ") + " --json", capsys)
        request = choices.request_of(choice["target"], choice["mode"], choice["length"], choice["mask"], choice["with"])
        assert found["request"] == json.loads(json.dumps(request.to_json())), command
        assert found["plan"]["kernel"] == told(request)["plan"][0]


def choose(page, **controls):
    """Sets controls by their labels: a select to the text of an option, a checkbox to True or False."""
    for label, value in controls.items():
        control = page.get_by_label(label.replace("_", " "), exact=True)
        if isinstance(value, bool):
            control.set_checked(value)
        else:
            control.select_option(label=value)


def shown(page):
    """What the page says: the winner, its adapters, and the reasons of the others, in their order."""
    result = page.locator(".matrix-result")
    others = []
    for other in result.locator(".matrix-other").all():
        lines = [line.text_content() for line in other.locator("li").all()]
        others.append((other.get_attribute("data-kernel"), lines or [other.locator("span").text_content()]))
    adapters = [adapter.text_content() for adapter in result.locator(".matrix-adapters code").all()]
    return {"kernel": result.locator(".matrix-winner").text_content(), "adapters": adapters, "others": others}


def address(page):
    """What follows the path in the page's address, as the page itself sees it now."""
    return page.evaluate("location.search")


def expected(request):
    found = told(request)
    kernel, *_, steps, _ = found["plan"]
    # Kernels for other platforms come last, in one group.
    others = sorted(found["others"], key=lambda other: other[1] == "elsewhere")
    return {"kernel": kernel, "adapters": [name for name, _ in steps], "others": [(o[0], o[2]) for o in others]}


def test_a_choice_shows_what_explain_says_and_its_address_restores_it(open_matrix):
    page = open_matrix("matrix/")
    assert shown(page) == expected(choices.request_of("gpu:h100", "train", 8192, "causal"))
    choose(page, Target="tpu:v6e", Mode="train", Mask="prefix, then causal", Dtype="float32")
    wanted = expected(choices.request_of("tpu:v6e", "train", 8192, "prefix", ["float32"]))
    assert wanted["adapters"]
    assert shown(page) == wanted
    assert page.get_by_role("status").first.text_content().startswith(wanted["kernel"])
    again = open_matrix("matrix/" + address(page))
    assert shown(again) == wanted
    assert again.get_by_label("Dtype").input_value() == "float32"
    again.get_by_role("button", name="Reset").click()
    assert address(again) == ""
    assert shown(again) == shown(open_matrix("matrix/?mode=nonsense&length=1&with=,,"))


def test_features_are_chosen_by_the_keyboard(open_matrix):
    page = open_matrix("matrix/?mode=decode&target=gpu:a100")
    box = page.get_by_label("soft cap", exact=True)
    page.get_by_label("Keys and values").focus()
    page.keyboard.press("Tab")
    assert box.evaluate("box => box === document.activeElement")
    page.keyboard.press("Space")
    assert "with=soft_cap" in address(page)
    assert shown(page) == expected(choices.request_of("gpu:a100", "decode", 8192, "causal", ["soft_cap"]))


def test_every_control_has_a_label(open_matrix):
    page = open_matrix("matrix/")
    controls = page.locator(".matrix-form :is(select, input)")
    assert controls.count() == 9 + sum(option.group == "feature" for option in choices.OPTIONS)
    assert controls.evaluate_all(
        "all => all.every((one) => one.labels.length === 1 && one.labels[0].textContent.trim())"
    )
    assert page.locator(".matrix-form fieldset > legend").count() == 2


def test_a_model_shows_its_layers_and_phases(open_matrix):
    page = open_matrix("matrix/")
    choose(page, Target="tpu:v5e", Model="gemma-2-27b")
    rows = page.locator(".matrix-model tbody tr:has(td)").all()
    calls = list(exporting.model_calls("gemma-2-27b", 8192, "contiguous", "tpu:v5e"))
    assert [row.locator("th").text_content() for row in rows] == [call for _, call, _ in calls]
    for row, (_, _, request) in zip(rows, calls, strict=True):
        plan = told(request)["plan"]
        assert row.locator("summary").first.text_content() == " + ".join([plan[0], *(name for name, _ in plan[4])])
    headings = page.locator(".matrix-model th[scope=rowgroup]").all()
    assert [heading.text_content().partition(":")[0] for heading in headings] == list(
        dict.fromkeys(c[0] for c in calls)
    )
    assert page.get_by_label("Mask", exact=True).is_hidden()


def test_what_was_not_exported_is_not_guessed(open_matrix):
    page = open_matrix("matrix/?with=dropout,sinks,bias")
    assert page.get_by_role("status").first.text_content().startswith("Not exported")
    assert page.locator(".matrix-winner").count() == 0
    page.get_by_role("button", name="without sinks").click()
    assert shown(page) == expected(choices.request_of("gpu:h100", "train", 8192, "causal", ["dropout", "bias"]))
    choose(page, Mode="decode")
    assert "dropout" in page.get_by_role("status").first.text_content()
    assert page.locator(".matrix-winner").count() == page.locator(".matrix-command").count() == 0


@pytest.mark.parametrize(
    "choice", ["target=tpu:v6e&mask=prefix&with=float32", "model=gemma-3-27b&target=tpu:v5e", "with=dropout,sinks,bias"]
)
def test_nothing_is_wider_than_a_phone(open_matrix, choice):
    page = open_matrix(f"matrix/?{choice}", width=390)
    page.locator(".matrix details").evaluate_all("all => all.forEach((one) => { one.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    wide = "all => all.filter((one) => one.scrollWidth > one.clientWidth + 1).map((one) => one.outerHTML.slice(0, 200))"
    assert page.locator(".matrix :is(dd, li, pre, td, th, fieldset, p)").evaluate_all(wide) == []


def test_the_tables_say_what_kernels_declare(open_page):
    text = support.markdown()
    kernels = {kernel.name: kernel.spec.capabilities for kernel in kernelry.kernels()}
    rows = {row[0]: set(re.findall(r"\[`(\w+)`\]", row[-1])) for row in map(cells, text.splitlines()) if len(row) == 2}
    assert rows["a soft cap"] == {name for name, can in kernels.items() if Feature.SOFT_CAP in can.features}
    assert rows["`spans`"] == {name for name, can in kernels.items() if AtomKind.SPANS in can.atoms}
    assert rows["in pages"] == {name for name, can in kernels.items() if can.pages}
    assert {f"### {name}" for name in kernels} <= set(text.splitlines())
    page = open_page("support/", width=390)
    assert "support matrix -->" not in page.content()
    ids = page.locator(".md-content h3").evaluate_all("all => all.map((one) => one.id)")
    links = page.locator(".md-content td a").evaluate_all("all => all.map((one) => one.getAttribute('href').slice(1))")
    assert set(links) == set(ids) == set(kernels)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def cells(line):
    return tuple(cell.strip() for cell in line.strip("|").split(" | ")) if line.startswith("|") else ()
