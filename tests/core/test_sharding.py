"""Sharding: texts, JSON, PartitionSpecs and logical axis rules that say one thing, and what is invalid says so."""

import dataclasses
import json
import subprocess
import sys

import jax
import pytest
from flax import linen
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from kernelry import masks
from kernelry.errors import ArgumentError, ConfigError, ShapeError
from kernelry.parallel import Sharding
from kernelry.request.request import Request
from kernelry.request.sharding import STRATEGIES, TOKEN_ORDERS

AXES = ("data", "fsdp", "tensor", "context", "expert", "stage")
MESH = jax.sharding.AbstractMesh((2, 1, 4, 8, 1, 3), AXES)


@st.composite
def shardings(draw):
    """Any valid Sharding without a mesh."""
    names = draw(st.permutations(AXES))
    ends = sorted(draw(st.lists(st.integers(0, len(AXES)), min_size=3, max_size=3)))
    batch, heads, sequence = (tuple(names[start:end]) for start, end in zip((0, *ends), ends, strict=False))
    kv = None
    if not sequence:
        kv = draw(st.sampled_from([None, tuple(names[ends[2] :])]))
    elif draw(st.booleans()):
        kv = draw(st.sampled_from([(), sequence]))
    strategy = draw(st.sampled_from([name for name in STRATEGIES if sequence or name != "usp"]))
    ulysses = sequence[draw(st.integers(0, len(sequence) - 1)) :] if strategy == "usp" else ()
    known = draw(st.lists(st.sampled_from([*batch, *heads, *sequence, *(kv or ())] or [None]), unique=True))
    sizes = {axis: draw(st.integers(1, 4)) for axis in known if axis is not None}
    order = draw(st.sampled_from([*TOKEN_ORDERS, "auto"]))
    return Sharding(
        batch=batch,
        heads=heads,
        sequence=sequence,
        kv_sequence=kv,
        strategy=strategy,
        ulysses=ulysses,
        order=order,
        sizes=sizes,
    )


@given(shardings())
def test_a_text_is_read_back(sharding):
    assert Sharding.parse(str(sharding)) == sharding
    assert hash(Sharding.parse(str(sharding))) == hash(sharding)


@given(shardings())
def test_json_is_read_back(sharding):
    assert Sharding.from_json(json.loads(json.dumps(sharding.to_json()))) == sharding


@given(shardings())
def test_a_mesh_says_the_sizes_and_leaves_axes_of_one_device_out(sharding):
    located = dataclasses.replace(sharding, sizes=()).on(dict(MESH.shape))
    assert dict(located.sizes) == {axis: MESH.shape[axis] for axis, _ in located.sizes}
    assert all(size > 1 for _, size in located.sizes)
    assert located.size(located.batch) == located.size(axis for axis in sharding.batch if MESH.shape[axis] > 1)
    assert located.on(dict(MESH.shape)) == located
    assert Sharding.parse(str(located)) == located
    assert located.order == (sharding.order if located.cuts_sequences else "contiguous")


def test_a_mesh_is_written_as_sizes():
    sharding = Sharding(batch="data", sequence=("context",), order="striped", mesh=MESH)
    assert sharding.to_json()["sizes"] == {"context": 8, "data": 2}
    assert str(Sharding.from_json(sharding.to_json())) == "batch=data:2 sequence=context:8 striped"


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("", Sharding()),
        ("batch=data:4 heads=tensor sequence=context:8 ring dual", None),
        ("sequence=context order=dual", Sharding(sequence="context", order="dual_chunk")),
        ("sequence=context strategy=ring order=dual_chunk", Sharding.parse("sequence=context ring dual")),
        ("sequence=context auto order=auto", Sharding(sequence="context", order="auto")),
        ("sequence=context kv_sequence=none", Sharding(sequence="context", kv_sequence=())),
        ("sequence=context kv_sequence=context", Sharding(sequence="context")),
        ("kv_sequence=context", Sharding(kv_sequence="context")),
        ("kv_sequence=none", Sharding()),
        ("sequence=c,u ulysses=u usp", Sharding(sequence=("c", "u"), ulysses="u", strategy="usp")),
        ("batch=none", Sharding()),
    ],
)
def test_texts_have_one_meaning(text, same):
    assert Sharding.parse(text) == (same or Sharding.parse(str(Sharding.parse(text))))


def test_a_sharding_is_returned_as_it_is():
    sharding = Sharding(batch="data", mesh=MESH)
    assert Sharding.parse(sharding) is sharding


@pytest.mark.parametrize(
    ("text", "located"),
    [
        ("sequence=fsdp,context ulysses=context usp", "sequence=context:8 ulysses"),
        ("sequence=context,fsdp ulysses=fsdp usp", "sequence=context:8 ring"),
        ("sequence=fsdp native dual", ""),
        ("batch=data sequence=fsdp ring order=auto", "batch=data:2"),
        ("sequence=context order=auto", "sequence=context:8 order=auto"),
        ("sequence=fsdp kv_sequence=none", ""),
    ],
)
def test_what_a_mesh_makes_of_a_sharding(text, located):
    assert str(Sharding.parse(text).on(dict(MESH.shape))) == located


BAD_AXES = "must be names of mesh axes, e.g. 'data' or \\('data', 'fsdp'\\), got "
BAD_SIZES = "sizes must be positive integers by axis, e.g. {'data': 4}, got "


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"batch": 3}, f"batch {BAD_AXES}3"),
        ({"heads": ("a", 1)}, f"heads {BAD_AXES}\\('a', 1\\)"),
        ({"batch": "a,b"}, "batch='a,b' cannot be written as text: rename the mesh axis to one word without , : ="),
        ({"batch": "a b"}, "batch='a b' cannot be written as text"),
        ({"batch": ""}, "batch='' cannot be written as text"),
        ({"sequence": ("none",)}, "sequence='none' cannot be written as text: .*other than 'none'"),
        ({"strategy": "rings"}, "unknown strategy 'rings'; did you mean 'ring'"),
        ({"order": "stripes"}, "unknown order 'stripes'; did you mean 'striped'"),
        ({"order": ["striped"]}, r"unknown order \['striped'\]"),
        ({"batch": "d", "mesh": "d:4"}, r"mesh must be a jax\.sharding\.Mesh, got 'd:4'"),
        ({"batch": "d", "heads": "d"}, "mesh axis 'd' is named twice in batch=d heads=d; name it once"),
        ({"batch": "d", "kv_sequence": "d"}, "mesh axis 'd' is named twice"),
        ({"sequence": "c", "kv_sequence": "k"}, r"queries are cut over \('c',\) and keys over \('k',\); cut both"),
        ({"sequence": ("c", "u"), "ulysses": "c", "strategy": "usp"}, r"ulysses=\('c',\) must be the last of the axes"),
        (
            {"sequence": ("c", "u"), "ulysses": "u"},
            r"ulysses=\('u',\) is for strategy='usp', and the strategy is 'auto'",
        ),
        ({"sequence": "c", "strategy": "usp"}, "strategy='usp' needs ulysses="),
        ({"batch": "d", "sizes": {"d": 0}}, f"{BAD_SIZES}{{'d': 0}}"),
        ({"batch": "d", "sizes": {"d": True}}, BAD_SIZES),
        ({"batch": "d", "sizes": 4}, f"{BAD_SIZES}4"),
        (
            {"batch": "data", "sizes": {"dat": 4}},
            "dat:4, and 'dat' is none of the axes of batch=data; did you mean 'data'",
        ),
    ],
)
def test_what_is_invalid_says_so(facts, words):
    with pytest.raises(ArgumentError, match=f"^Sharding: .*{words}"):
        Sharding(**facts)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (3, "a sharding is written e.g. 'batch=d:4 sequence=c:8 ring', got 3"),
        ("batsh=d", "'batsh=d' is neither axes nor a strategy nor an order; did you mean 'batch'"),
        ("ringg", "'ringg' is neither axes nor a strategy nor an order; did you mean 'ring'"),
        ("ring=c", "'ring=c' is neither axes nor a strategy"),
        ("batch=d batch=e", "batch is given twice"),
        ("ring strategy=ring", "strategy is given twice"),
        ("batch=d:x", "'d:x' must be an axis and its size, e.g. data:4"),
        ("batch=d:0", "'d:0' must be an axis and its size"),
        ("sequence=d:2 kv_sequence=d:4", "'d:4' must be an axis and its size"),
        ("order=striped_", "unknown order 'striped_'; did you mean 'striped'"),
    ],
)
def test_a_text_of_another_form_says_what_is_wrong(text, words):
    with pytest.raises(ArgumentError, match=words):
        Sharding.parse(text)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"sequnce": "c"}, "sharding: unknown field 'sequnce'; did you mean 'sequence'"),
        ({"mesh": "m"}, "sharding: unknown field 'mesh'"),
        ("batch=d", "sharding: expected an object with its fields, got 'batch=d'"),
        ({"batch": 3}, "sharding: batch must be names of mesh axes"),
    ],
)
def test_json_of_another_form_says_what_is_wrong(data, words):
    with pytest.raises(ConfigError, match=words):
        Sharding.from_json(data)


@pytest.mark.parametrize(
    ("sharding", "words"),
    [
        (Sharding(batch="dat"), r"batch='dat', and the mesh {'data': 2, .*} has no such axis; did you mean 'data'"),
        (Sharding(batch="data", sizes={"data": 4}), r"axis 'data' has size 2 in the mesh {'data': 2, .*}, not 4"),
    ],
)
def test_a_mesh_with_other_axes_says_which(sharding, words):
    with pytest.raises(ArgumentError, match=words):
        sharding.on(dict(MESH.shape))


@pytest.mark.parametrize(
    ("text", "facts", "words"),
    [
        ("batch=d:4", {"batch": 6}, r"batch B=6 does not divide over d: 6 % 4 = 2; pad to 8"),
        ("heads=t:4", {"q_heads": 6}, r"heads N=6 does not divide over t: 6 % 4 = 2\."),
        ("sequence=c:8", {"q_len": 250}, r"query length T=250 does not divide over c: 250 % 8 = 2; pad to 256"),
        ("sequence=c:8 dual", {"q_len": 24}, r"T=24 does not divide over c, two chunks for each device: 24 % 16 = 8; "),
        ("sequence=c:4,u:2", {"q_len": 12}, r"T=12 does not divide over c and u: 12 % 8 = 4; pad to 16"),
        ("kv_sequence=c:8", {"q_len": 1, "kv_len": 250}, r"key length S=250 does not divide over c: 250 % 8 = 2"),
    ],
)
def test_sizes_that_do_not_divide_have_the_arithmetic(text, facts, words):
    with pytest.raises(ShapeError, match=words):
        Request(**{"q_len": 8, **facts, "mask": masks.Full()}, sharding=text)


# PartitionSpecs


@pytest.mark.parametrize(
    ("specs", "text"),
    [
        ((P("data", "context", "tensor"),), "batch=data heads=tensor sequence=context"),
        ((P(("data", "fsdp"), None, "tensor", None),), "batch=data,fsdp heads=tensor"),
        ((P(), P()), ""),
        ((P("data"), P("data", "context")), "batch=data kv_sequence=context"),
        ((P("data", "context"), P("data")), "batch=data sequence=context kv_sequence=none"),
        ((P(None, "context", "tensor"), P(None, "context")), "heads=tensor sequence=context"),
        ((("data", ["context"]),), "batch=data sequence=context"),
    ],
)
def test_specs_are_read(specs, text):
    assert Sharding.of_specs(*specs) == Sharding.parse(text)
    assert Sharding.of_specs(*specs, order="striped").order == "striped"


@given(shardings())
def test_specs_of_a_sharding_are_read_back(sharding):
    query = P(sharding.batch or None, sharding.sequence or None, sharding.heads or None)
    key = P(sharding.batch or None, sharding.kv_axes or None, sharding.heads or None)
    more = {name: getattr(sharding, name) for name in ("strategy", "ulysses", "order", "sizes")}
    assert Sharding.of_specs(query, key, **more) == sharding


@pytest.mark.parametrize(
    ("specs", "words"),
    [
        (("data",), "the spec of query must be a PartitionSpec of four dimensions, got 'data'"),
        ((P(None, None, None, None, "data"),), "the spec of query must be a PartitionSpec of four dimensions"),
        ((P("data"), 3), "the spec of key must be a PartitionSpec of four dimensions, got 3"),
        ((P(None, None, None, "tensor"),), r"the head dim cannot be cut, got \('tensor',\)"),
        ((P("data"), P("data", None, None, "tensor")), r"the head dim cannot be cut, got \('tensor',\)"),
        ((P("data"), P("fsdp")), r"batch are cut over \('data',\) in query and over \('fsdp',\) in key"),
        ((P(None, None, "t"), P(None, None, "u")), r"heads are cut over \('t',\) in query and over \('u',\) in key"),
        ((P(P.UNCONSTRAINED),), "UNCONSTRAINED in the spec of query, .*, is neither mesh axes nor None"),
    ],
)
def test_specs_that_cannot_be_honoured_say_why(specs, words):
    with pytest.raises(ArgumentError, match=f"^Sharding: .*{words}"):
        Sharding.of_specs(*specs)


# Logical axis rules

NAMES = ("activation_batch", "activation_length", "activation_heads", "activation_kv_length", "other")
RULES = [
    ["activation_batch", ["data", "fsdp", "expert"]],
    ["activation_heads", "tensor"],
    ["activation_length", ["context"]],
    ["activation_kv_length", []],
]


def test_rules_with_the_names_of_maxtext_are_read():
    sharding = Sharding.of_rules(RULES, strategy="ring", order="dual_chunk")
    assert str(sharding) == "batch=data,fsdp,expert heads=tensor sequence=context ring dual_chunk"
    gathered = Sharding.of_rules(RULES, kv_length="activation_kv_length")
    assert str(gathered) == "batch=data,fsdp,expert heads=tensor sequence=context kv_sequence=none"
    assert str(Sharding.of_rules(RULES, batch=None, heads=None)) == "sequence=context"
    assert str(Sharding.of_rules([("b", "x"), ("t", None)], batch="b", q_length="t", heads=None)) == "batch=x"


_RULES = st.lists(
    st.tuples(
        st.sampled_from(NAMES),
        st.none() | st.sampled_from(AXES) | st.lists(st.sampled_from(AXES), unique=True, max_size=3).map(tuple),
    ),
    max_size=12,
)


@given(_RULES)
def test_rules_are_resolved_as_flax_resolves_them(rules):
    rules = [*rules, *((name, None) for name in NAMES)]
    spec = linen.logical_to_mesh_axes(("activation_batch", "activation_length", "activation_heads"), rules)
    assert Sharding.of_rules(rules) == Sharding.of_specs(spec)


def test_the_current_rules_of_flax_are_those_meant():
    with linen.logical_axis_rules(RULES):
        assert Sharding.of_rules() == Sharding.of_rules(RULES)
    with pytest.raises(ArgumentError, match=r"no logical axis rules are active; pass them, or enter flax\.linen\."):
        Sharding.of_rules()


PAIRS = "rules must be pairs of a name and its mesh axes, got "
RULE = r"a rule is a logical name and its mesh axes, e.g. \('activation_batch', \('data', 'fsdp'\)\), got "


@pytest.mark.parametrize(
    ("rules", "names", "words"),
    [
        (RULES, {"batch": "activation_btch"}, "batch='activation_btch' has no rule; did you mean 'activation_batch'"),
        (RULES[:1], {}, "heads='activation_heads' has no rule"),
        (RULES[:2], {}, "q_length='activation_length' has no rule"),
        (RULES, {"kv_length": "kv"}, "kv_length='kv' has no rule"),
        ("rules", {}, f"{PAIRS}'rules'"),
        (3, {}, f"{PAIRS}3"),
        (["ab"], {}, f"{RULE}'ab'"),
        ([("a", "b", "c")], {}, RULE),
        ([("a", 3)], {}, RULE),
        ([("a", ["b", 3])], {}, RULE),
        ([(3, "b")], {}, RULE),
    ],
)
def test_rules_that_do_not_name_axes_say_so(rules, names, words):
    with pytest.raises(ArgumentError, match=f"^Sharding.of_rules: {words}"):
        Sharding.of_rules(rules, **names)


def test_rules_that_are_passed_need_no_flax():
    code = (
        "import sys; from kernelry.parallel import Sharding; "
        "Sharding.of_rules([('b', 'd')], batch='b', heads=None, q_length=None); print('flax' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, "False"), done.stderr
