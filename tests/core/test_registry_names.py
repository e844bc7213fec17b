"""Names of plugins, kernels, masks and normalizations: claimed twice, allowed, in any order."""

import dataclasses
import re
import sys

import importlib_metadata
import pytest

import kernelry
from kernelry import cli
from kernelry.errors import KernelRefusedError, NoKernelError, PluginError
from kernelry.policy.policy import Switches
from kernelry.registry import discovery, installed
from kernelry.registry.contents import FaultKind

MASKS = """
    from kernelry.masks import Causal
    from kernelry.plugin import hookimpl
    contract = (1, 1)

    @hookimpl
    def kernelry_masks():
        return {"mine": Causal}
"""
NORMALIZATIONS = """
    from kernelry.execution.normalization import LogSumExp
    from kernelry.plugin import hookimpl
    contract = (1, 1)

    @hookimpl
    def kernelry_normalizations():
        return {"mine": LogSumExp()}
"""


def test_two_plugins_with_one_name_are_both_excluded(shelf):
    for project in ("first", "second"):
        shelf.put_kernel(project, f"{project}_kernel", name="same")
    found = shelf.build()
    (fault,) = found.faults
    assert (fault.kind, fault.distribution) == (FaultKind.DUPLICATE_PLUGIN, "first 1.0 and second 1.0")
    assert fault.fix == "uninstall one of them, or rename the entry point of yours"
    assert list(found.kernels) == ["healthy_kernel"]


def test_one_plugin_under_two_names_is_used_once(shelf):
    info = shelf.put_kernel("double", "double_kernel")
    (info / "entry_points.txt").write_text(f"[{discovery.GROUP}]\none = double\ntwo = double\n")
    found = shelf.build()
    (fault,) = found.faults
    assert (fault.kind, fault.plugin) == (FaultKind.DUPLICATE_PLUGIN, "two")
    assert fault.detail == "it is the plugin 'one' under a second name, which is not used"
    assert list(found.kernels) == ["double_kernel", "healthy_kernel"]


@pytest.fixture
def contested(shelf, install):
    for project in ("first", "second"):
        shelf.put_kernel(project, "same_kernel")
    return install()


def test_contested_kernel_is_reported_for_both_distributions(contested):
    detail = "kernel 'same_kernel' is claimed by first 1.0 and second 1.0; none of them is used"
    assert [(fault.kind, fault.distribution, fault.detail) for fault in contested.faults] == [
        (FaultKind.DUPLICATE_KERNEL, "first 1.0", detail),
        (FaultKind.DUPLICATE_KERNEL, "second 1.0", detail),
    ]


def test_contested_kernel_is_excluded(contested):
    assert list(contested.kernels) == ["healthy_kernel"]


def test_contested_kernel_asked_for_raises(contested, fresh_request):
    with pytest.raises(PluginError, match=r"claimed by first 1\.0 and second 1\.0; .*; uninstall one of them"):
        kernelry.resolve(fresh_request, kernel="same_kernel")


def test_contested_kernel_leaves_auto_alone(contested, fresh_request):
    assert kernelry.resolve(fresh_request).kernel == "healthy_kernel"


def test_kernel_claimed_twice_by_one_plugin_is_reported_once(shelf):
    body = "from kernelry_dot_product.plugin import DOT_PRODUCT; return 2 * [DOT_PRODUCT]"
    shelf.put_hook("broken", "kernelry_kernels()", body)
    (fault,) = shelf.build().faults
    assert fault.detail == "kernel 'dot_product' is claimed twice by broken 1.0 and not used"


@pytest.mark.parametrize(("source", "table"), [(MASKS, "masks"), (NORMALIZATIONS, "normalizations")])
def test_name_claimed_once_is_listed(shelf, source, table):
    shelf.put("first", source)
    assert "mine" in getattr(shelf.build(), table)


@pytest.mark.parametrize(("source", "table"), [(MASKS, "masks"), (NORMALIZATIONS, "normalizations")])
def test_name_claimed_twice_is_nobodys(shelf, source, table):
    shelf.put("first", source)
    shelf.put("second", source)
    found = shelf.build()
    assert "mine" not in getattr(found, table)
    assert [(fault.kind, fault.distribution) for fault in found.faults] == [
        (FaultKind.DUPLICATE_NAME, "first 1.0"),
        (FaultKind.DUPLICATE_NAME, "second 1.0"),
    ]


def test_normalization_of_core_cannot_be_replaced(shelf):
    shelf.put("broken", NORMALIZATIONS.replace("mine", "softmax"))
    found = shelf.build()
    assert found.normalizations["softmax"] is discovery._CORE_NORMALIZATIONS["softmax"]
    assert [fault.kind for fault in found.faults] == [FaultKind.DUPLICATE_NAME]


# The allow-list and the environment variables.


def test_allow_list_loads_only_what_it_names(shelf):
    shelf.put("broken", "1 / 0")
    found = shelf.build(("healthy",))
    assert [(plugin.name, plugin.enabled) for plugin in found.plugins] == [("broken", False), ("healthy", True)]
    assert found.faults == ()


def test_empty_allow_list_loads_nothing(shelf):
    assert not shelf.build(()).kernels


def test_unknown_name_in_allow_list_is_reported_with_the_nearest(shelf):
    (fault,) = shelf.build(("healthy", "healty")).faults
    assert fault.kind is FaultKind.UNKNOWN_IN_ALLOW_LIST
    assert fault.detail == "KERNELRY_PLUGINS names 'healty', which is not installed; did you mean 'healthy'?"
    assert fault.fix == "correct or unset KERNELRY_PLUGINS"


def test_unknown_name_in_allow_list_raises_when_plugins_are_needed(install, fresh_request):
    install(("healthy", "healty"))
    with pytest.raises(PluginError, match=r"did you mean 'healthy'\? Correct or unset KERNELRY_PLUGINS\.$"):
        kernelry.resolve(fresh_request)


@pytest.mark.parametrize(
    ("variable", "names"), [(None, None), ("", ()), ("healthy", ("healthy",)), (" a , b,", ("a", "b"))]
)
def test_plugins_variable_is_a_list_of_names(variable, names):
    assert Switches.parse({} if variable is None else {"KERNELRY_PLUGINS": variable}).plugins == names


def test_unknown_variable_warns_with_the_nearest():
    with pytest.warns(UserWarning, match="KERNELRY_PLUGIN is ignored; did you mean 'KERNELRY_PLUGINS'"):
        Switches.parse({"KERNELRY_PLUGIN": "x"})


# Load order.


def _facts(found):
    return (
        [(name, kernel.plugin, kernel.distribution) for name, kernel in found.kernels.items()],
        [plugin.to_json() for plugin in found.plugins],
        [fault.to_json() for fault in found.faults],
        dict(found.contested),
        list(found.masks),
        list(found.normalizations),
    )


def test_load_order_decides_nothing(shelf):
    shelf.put_kernel("first", "same_kernel")
    shelf.put_kernel("second", "same_kernel")
    shelf.put("third", MASKS)
    info = shelf.put("fourth", "1 / 0")
    (info / "entry_points.txt").write_text(f"[{discovery.GROUP}]\none = fourth\none = third\n")
    points = shelf.points()
    expected = _facts(discovery.build(points))
    turned = [points[first:] + points[:first] for first in range(len(points))]
    for order in turned + [order[::-1] for order in turned]:
        assert _facts(discovery.build(order)) == expected


# Kernels of this project that are missing.

ACCELERATED = """
    import dataclasses
    from kernelry.plugin import hookimpl
    from kernelry_dot_product.plugin import DOT_PRODUCT

    contract = (1, 1)
    facts = {"platforms": frozenset({"gpu", "tpu"}), "dtypes": frozenset({"bfloat16"})}
    can = dataclasses.replace(DOT_PRODUCT.capabilities, **facts)

    @hookimpl
    def kernelry_kernels():
        return [dataclasses.replace(DOT_PRODUCT, name=f"fast_{count}", capabilities=can) for count in range(20)]
"""
MISSING = "No plain kernel is available, which would serve every mask and option: "


@pytest.fixture
def accelerated(shelf, monkeypatch):
    """Twenty kernels, none of them for CPUs, and no plain kernel."""
    shelf.put("fast", ACCELERATED)
    found = shelf.build(("fast",))
    monkeypatch.setattr(installed, "registry", lambda: found)
    return found


def test_the_table_of_this_projects_kernels_is_what_its_plugins_bring():
    for distribution, named in installed.KERNELS_OF.items():
        brought = {kernel.name for kernel in kernelry.kernels() if kernel.distribution.split(" ")[0] == distribution}
        assert brought == set(named)


def test_twenty_kernels_of_other_platforms_are_one_line_and_the_last_says_what_to_install(accelerated, fresh_request):
    with pytest.raises(NoKernelError) as caught:
        kernelry.resolve(fresh_request)
    lines = str(caught.value).splitlines()
    assert len(lines) == 4
    assert lines[1].startswith("  decided by: shipped policy")
    assert lines[2].startswith("    not for cpu: fast_0, fast_1, ")
    assert lines[3] == f"  {MISSING}pip install kernelry-dot-product."


def test_kernels_of_the_platform_keep_their_reasons_and_others_are_named(accelerated, fresh_request):
    request = dataclasses.replace(fresh_request, target="gpu:h100", dtype="float32")
    with pytest.raises(NoKernelError) as caught:
        kernelry.resolve(request)
    lines = str(caught.value).splitlines()
    assert "    fast_7: dtype=float32 is not bfloat16" in lines
    made = "Kernels made for gpu: pip install kernelry-gpu-pallas kernelry-cudnn-te."
    assert lines[-1] == f"  {MISSING}pip install kernelry-dot-product. {made}"


def test_explanations_name_it_as_text_and_data(accelerated, fresh_request):
    resolution = kernelry.explain(fresh_request)
    assert str(resolution).endswith(f"\n  {MISSING}pip install kernelry-dot-product.")
    assert resolution.to_json()["advice"] == f"{MISSING}pip install kernelry-dot-product."
    served = kernelry.explain(dataclasses.replace(fresh_request, target="tpu:v5e", dtype="bfloat16"))
    assert (served.kernel, served.advice) == ("fast_0", None)


def test_a_request_that_plain_kernels_would_refuse_names_none(accelerated, fresh_request):
    resolution = kernelry.explain(dataclasses.replace(fresh_request, dtype="float8_e4m3fn"))
    assert (resolution.kernel, resolution.advice) == (None, None)


def test_a_kernel_of_this_project_asked_for_names_its_distribution(accelerated, fresh_request):
    with pytest.raises(KernelRefusedError) as caught:
        kernelry.resolve(fresh_request, kernel="splash")
    assert "  splash: no installed plugin brings a kernel of that name; pip install kernelry-tpu-splash\n" in str(
        caught.value
    )
    with pytest.raises(KernelRefusedError, match="fast_0: platform=cpu(.*\n)+  " + re.escape(MISSING)):
        kernelry.resolve(fresh_request, kernel="fast_0")


@pytest.mark.parametrize("verb", ["list", "doctor", "explain"])
def test_commands_name_it(accelerated, monkeypatch, capsys, verb):
    monkeypatch.setattr(sys, "argv", ["kernelry", verb])
    cli.main()
    assert f"{MISSING}pip install kernelry-dot-product." in " ".join(capsys.readouterr().out.split())


def test_a_plain_kernel_that_the_allow_list_leaves_out_is_named_with_the_variable(monkeypatch, fresh_request):
    points = importlib_metadata.entry_points(group=discovery.GROUP)
    found = discovery.build(points, ("tpu_splash",))
    monkeypatch.setattr(installed, "registry", lambda: found)
    assert kernelry.explain(fresh_request).advice == f"{MISSING}add dot_product to KERNELRY_PLUGINS, or unset it."


def test_where_there_are_no_kernels_the_reason_is_the_true_one(monkeypatch, shelf, fresh_request):
    shelf.put("broken", "raise ImportError('gone')")

    def reason(found):
        monkeypatch.setattr(installed, "registry", lambda: found)
        kernelry.resolution.resolver.clear_cache()
        with pytest.raises(NoKernelError) as caught:
            kernelry.resolve(fresh_request)
        [told] = [line for line in str(caught.value).splitlines() if line.startswith("    no kernels: ")]
        unserved = kernelry.explain(fresh_request).unserved.removeprefix("no kernel serves it (").removesuffix(")")
        assert told == f"    no kernels: {unserved}"
        return unserved

    assert reason(discovery.build(())) == "no kernels are installed"
    assert reason(shelf.build(())) == "KERNELRY_PLUGINS leaves out broken, healthy"
    bring_none = "the plugins that are loaded provide none that can be used: run kernelry doctor"
    assert reason(shelf.build(("broken",))) == f"KERNELRY_PLUGINS leaves out healthy; {bring_none}"
    monkeypatch.undo()
    found = kernelry.explain(fresh_request, kernels=())
    assert found.unserved == (
        "no kernel serves it (there is none to choose from: kernels= leaves out those that are installed)"
    )


def test_a_plain_kernel_that_is_installed_and_faulty_points_to_doctor(shelf, monkeypatch, fresh_request):
    shelf.put("fast", ACCELERATED)
    found = shelf.build(("fast",))
    plugin = dataclasses.replace(
        found.plugins[0], name="dot_product", distribution="kernelry-dot-product 1.0", enabled=True
    )
    faulty = dataclasses.replace(found, plugins=(*found.plugins, plugin))
    monkeypatch.setattr(installed, "registry", lambda: faulty)
    advice = kernelry.explain(fresh_request).advice
    assert advice == f"{MISSING}kernelry-dot-product is installed and faulty; run kernelry doctor."
