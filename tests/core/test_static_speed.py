"""Schedules as libtpu writes them, and the seconds that follow from them. The texts are written here, in its format."""

import dataclasses
import json

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from kernelry.aot.speed import ASSUMPTIONS, CLOCKS, CORES, STEP_CYCLES, Grid, KernelSpeed, tpu_speed
from kernelry.aot.tpu_schedule import Region, Schedule, ScheduleError, read_schedule
from kernelry.errors import ArgumentError, KernelryError
from kernelry.resolution.published import DEVICE_RATES

OLD = "%1 = vmatmul.bf16.gmra.mxu{unit} %v1"
OLD_FLOAT = "%1 = vmatmul.f32.gmra.mxu{unit} %v1"
NEW = "%1 = vmatmul.mubr.bf16.gmra.mrb[4].mxu{unit} %v1"
V6E = "%1 = vmatmul.mubr.bf16.vlgmr.msra.gmra.mxu{unit} %v1"
NEW_FLOAT = "%1 = vmatmul.mubr.f32.vlgmr.msra.gmra.mrb[0].mxu{unit} %v1"
SPILL = "%2 = vst [vmem:[#allocation9_spill] sm:$0xff] %v1"
FILL = "%v3 = vld [vmem:[#allocation9_spill] sm:$0xff]"
SCALAR_SPILL = "%4 = sst [smem:[#allocation8_spill]] %s1"
STORE = "%5 = vst [vmem:[#allocation7 + $0x8] sm:$0xff] %v1"
COPY = "%6 = dma.hbm_to_vmem [thread:$0]  /*hbm=*/%s1"
WAIT = "%7 = dma.done.wait [#allocation6], 8192 /* pipeline-emitter-dma-wait */"
BOUNDS = "%8 = dma.hbm_to_vmem [thread:$0] /* \niteration_bounds: (2, 4, 2147483647)\nstrides: (64, 1) */"
SLOTS = 4
"""Bundles after a branch that run whether or not it is taken."""


class Text:
    """The final bundles of a kernel, written one after another."""

    def __init__(self):
        self.lines, self.address, self.regions = ["= control target key start", "LB: loop body"], 0, 100

    def bundle(self, *instructions, mark="  ", comment=""):
        body = "  ;;  ".join(instructions)
        self.lines.append(f" {self.address:#x} {mark} : > {{ {body} }} {comment}".replace("0x0 ", "0 "))
        self.address += 1

    def bundles(self, count):
        for _ in range(count):
            self.bundle()

    def branch(self, region):
        self.bundle(f"%9 = sbr.rel (%p1) target = $region{region}")
        self.bundles(SLOTS)

    def part(self, *bundles):
        """A region that a step may skip, of bundles given as lists of instructions."""
        self.regions += 2
        inside, after = self.regions, self.regions + 1
        self.branch(after)
        for place, instructions in enumerate(bundles):
            notes = [f"Start region {inside}"] * (place == 0) + [f"End region {inside}"] * (place == len(bundles) - 1)
            self.bundle(*instructions, comment=f"/* {' :: '.join(notes)} */" if notes else "")
        self.bundle(mark="PF", comment=f"/* Start/End empty region {after} */")

    def grid(self, *parts, before=3, after=2, closed=True):
        """A loop of parts that a step may skip."""
        self.bundles(before)
        self.bundle(mark="LB", comment="/* Start region 7 */")
        for part in parts:
            self.part(*part)
        self.bundle(comment="/* End region 7 :: Start region 8 */")
        if closed:
            self.branch(7)
            self.lines[-1] += " /* End region 8 */"
        self.bundles(after)
        return str(self)

    def __str__(self):
        return "\n".join(self.lines)


def matmuls(count, instruction=OLD, units=4):
    return [[instruction.format(unit=place % units)] for place in range(count)]


STEP = 1 + 1 + 1 + SLOTS
"""Bundles of a step without parts: the head of the loop, its end, and the branch back."""

SKIP = 1 + SLOTS + 1
"""Bundles of a part that is skipped: the branch, its delay slots, and what the branch goes to."""


def test_a_region_with_a_product_is_the_body_and_the_rest_of_the_loop_is_overhead():
    found = read_schedule(Text().grid(matmuls(40)))
    assert [body.cycles for body in found.bodies] == [40]
    assert (found.overhead, found.row) == (STEP + SKIP, 0)


def test_bundles_outside_the_loop_count_nowhere():
    assert read_schedule(Text().grid(matmuls(9), before=50, after=70)) == read_schedule(Text().grid(matmuls(9)))


def test_regions_without_a_product_that_a_step_may_skip_run_once_a_row():
    found = read_schedule(Text().grid([[STORE]] * 11, matmuls(40), [[STORE]] * 5))
    assert ([body.cycles for body in found.bodies], found.row) == ([40], 16)
    assert found.overhead == STEP + 3 * SKIP


@pytest.mark.parametrize("transfer", [COPY, WAIT])
def test_a_region_that_copies_blocks_is_overhead_of_every_step(transfer):
    found = read_schedule(Text().grid([[STORE]] * 6 + [[transfer]], matmuls(40)))
    assert (found.row, found.overhead) == (0, STEP + 2 * SKIP + 7)


def test_bodies_stand_in_the_order_of_the_program():
    found = read_schedule(Text().grid(matmuls(30), matmuls(20), matmuls(25)))
    assert [body.cycles for body in found.bodies] == [30, 20, 25]
    assert found.body.cycles == 20


@pytest.mark.parametrize(
    ("instruction", "units", "cycles"),
    [(OLD, 4, 16), (OLD_FLOAT, 4, 8), (NEW, 2, 8), (NEW_FLOAT, 2, 4), (V6E, 2, 8)],
)
def test_a_product_occupies_its_matrix_unit_for_the_rows_of_a_register(instruction, units, cycles):
    [body] = read_schedule(Text().grid(matmuls(units * 5, instruction, units))).bodies
    assert (body.cycles, body.mxu) == (units * 5, 5 * cycles)


def test_the_busiest_matrix_unit_counts():
    loads = [[OLD.format(unit=0)]] * 3 + [[OLD.format(unit=1)]] * 7
    assert read_schedule(Text().grid(loads)).bodies[0].mxu == 7 * 16


def test_two_products_of_one_bundle_count_twice():
    both = [[OLD.format(unit=0), OLD_FLOAT.format(unit=0)]]
    assert read_schedule(Text().grid(both)).bodies[0].mxu == 24


def test_vector_spills_and_fills_are_counted_and_scalar_ones_are_not():
    found = read_schedule(Text().grid([[SPILL, FILL], [SPILL], [SCALAR_SPILL], [STORE], *matmuls(4)], [[SPILL]]))
    assert (found.bodies[0].spills, found.spills) == (3, 3)


def test_a_kernel_of_one_step_has_no_loop():
    text = Text()
    text.bundles(3)
    text.part(*matmuls(12))
    found = read_schedule(str(text))
    assert ([body.cycles for body in found.bodies], found.overhead) == ([12], 3 + SKIP)


def test_a_step_that_is_a_turn_of_a_loop_is_known_as_one():
    text = Text()
    text.bundle(OLD.format(unit=0))
    assert not read_schedule(str(text)).looped
    assert read_schedule(Text().grid(matmuls(4))).looped


def test_without_a_part_that_a_step_may_skip_the_whole_step_is_the_body():
    text = Text()
    text.bundle(mark="LB", comment="/* Start region 7 */")
    for instructions in matmuls(12):
        text.bundle(*instructions)
    text.branch(7)
    text.lines[-1] += " /* End region 7 */"
    found = read_schedule(str(text))
    assert ([body.cycles for body in found.bodies], found.overhead, found.row) == ([1 + 12 + 1 + SLOTS], 0, 0)


def test_a_part_around_the_body_is_not_the_body():
    text = Text()
    text.bundle(mark="LB", comment="/* Start region 7 */")
    text.branch(41)
    text.bundle(comment="/* Start region 40 */")
    text.part(*matmuls(12))
    text.bundle(comment="/* End region 40 */")
    text.bundle(mark="PF", comment="/* Start/End empty region 41 */")
    text.branch(7)
    text.lines[-1] += " /* End region 7 */"
    assert [body.cycles for body in read_schedule(str(text)).bodies] == [12]


def test_a_part_inside_a_body_that_has_products_of_its_own_is_skipped():
    text = Text()
    text.bundle(mark="LB", comment="/* Start region 7 */")
    text.branch(50)
    text.bundle(OLD.format(unit=0), comment="/* Start region 49 */")
    text.part(*matmuls(3), [SPILL])
    text.bundle(OLD.format(unit=0), comment="/* End region 49 */")
    text.bundle(mark="PF", comment="/* Start/End empty region 50 */")
    text.bundle(comment="/* End region 7 :: Start region 8 */")
    text.branch(7)
    text.lines[-1] += " /* End region 8 */"
    [body] = read_schedule(str(text)).bodies
    assert body == Region(1 + 1 + SLOTS + 1 + 1, 2 * 16, 0)


def test_the_bounds_of_the_grid_are_those_of_one_core():
    assert read_schedule(Text().grid([[BOUNDS]], matmuls(4))).bounds == (2, 4, 0)
    assert read_schedule(Text().grid(matmuls(4))).bounds == ()


def utilization(bundles, used=None):
    rows = ["0 0 1 0 0 0 0 0 0 0"] * bundles
    for place, row in (used or {}).items():
        rows[place] = row
    head = ["== CAPACTIY:", "MXU, XLU, VALU, VPOP, EUP, VLOAD, VLOAD:FILL, VSTORE, VSTORE:SPILL, SALU"]
    return "\n".join([*head, "    4     3     4     2     1     3     3     1     1     2", "== UTILIZATION:", *rows])


def test_the_busiest_slot_is_that_of_the_body():
    text = Text()
    bundles = text.grid(matmuls(10), before=3)
    first = 3 + 1 + 1 + SLOTS
    used = {first + place: "4 0 0 0 0 0 0 1 0 0" for place in range(6)}
    [body] = read_schedule(bundles, utilization(text.address, used)).bodies
    assert body.busiest == ("VSTORE", 0.6)
    assert read_schedule(bundles).bodies[0].busiest == ("", 0.0)


def test_the_utilization_of_another_kernel_is_an_error():
    text = Text()
    bundles = text.grid(matmuls(10))
    with pytest.raises(ScheduleError, match=rf"is of 5 bundles, and the schedule has {text.address}: pass the two"):
        read_schedule(bundles, utilization(5))


@pytest.mark.parametrize("text", ["", "no such file", "= control target key start\nLB: loop body\n"])
def test_a_text_without_bundles_is_an_error(text):
    with pytest.raises(ScheduleError, match="This text has no bundles"):
        read_schedule(text)


def test_a_loop_without_an_end_is_an_error():
    with pytest.raises(ScheduleError, match="The loop that begins at 0x3 has no branch back to it"):
        read_schedule(Text().grid(matmuls(10), closed=False))


def test_a_kernel_without_products_is_an_error():
    with pytest.raises(ScheduleError, match="No region of these bundles has a vmatmul"):
        read_schedule(Text().grid([[STORE]] * 4))


def test_a_loop_in_a_body_is_an_error():
    text = Text()
    text.bundle(mark="LB", comment="/* Start region 7 */")
    text.branch(41)
    text.bundle(mark="LB", comment="/* Start region 40 :: Start region 42 */")
    text.bundle(OLD.format(unit=0), "%9 = sbr.rel (%p1) target = $region42", comment="/* End region 42 */")
    text.bundles(SLOTS)
    text.bundle(comment="/* End region 40 */")
    text.bundle(mark="PF", comment="/* Start/End empty region 41 */")
    text.branch(7)
    text.lines[-1] += " /* End region 7 */"
    with pytest.raises(ScheduleError, match="has a loop at 0x6, and its turns are not known"):
        read_schedule(str(text))


def test_a_schedule_error_is_a_value_error_of_kernelry():
    assert issubclass(ScheduleError, KernelryError)
    assert issubclass(ScheduleError, ValueError)


# The model

PLAIN = Schedule((Region(1000, 600, 0), Region(1200, 600, 0)), 100, 300)


def predicted(schedule=PLAIN, grid=None, moved=0.0, kind="v5e"):
    return tpu_speed("kernel", schedule, grid or Grid(16, 10, 4), moved, kind, "libtpu 1")


def test_cycles_are_those_of_steps_and_visible_blocks_and_rows():
    cycles = 16 * (100 + STEP_CYCLES) + 10 * 1000 + 4 * 300
    assert predicted().seconds == pytest.approx(cycles / 1.5e9)


def test_blocks_that_the_mask_cuts_take_the_longest_body():
    found = predicted(grid=Grid(16, 10, 4, cut=4)).seconds - predicted().seconds
    assert found == pytest.approx(4 * 200 / 1.5e9)


def test_a_body_takes_as_long_as_the_matrix_unit_is_occupied():
    busy = Schedule((Region(1000, 1120, 0),), 100, 300)
    assert predicted(busy).seconds - predicted().seconds == pytest.approx(10 * 120 / 1.5e9)


def test_two_cores_share_the_steps():
    grid = Grid(32, 20, 8, shape=(2, 4, 4))
    split = dataclasses.replace(PLAIN, bounds=(1, 4, 4))
    whole = dataclasses.replace(PLAIN, bounds=(2, 4, 4))
    assert predicted(whole, grid, kind="v5p").seconds == pytest.approx(2 * predicted(split, grid, kind="v5p").seconds)
    assert predicted(split, grid, kind="v5e") == dataclasses.replace(predicted(whole, grid, kind="v5e"), schedule=split)


def test_sizes_that_only_the_program_knows_are_shared_by_those_that_are_known():
    grid = Grid(32, 20, 8, shape=(2, 0))
    assert predicted(dataclasses.replace(PLAIN, bounds=(1, 0)), grid, kind="v5p").seconds == pytest.approx(
        predicted(dataclasses.replace(PLAIN, bounds=(2, 0)), grid, kind="v5p").seconds / 2
    )


def test_without_bounds_both_cores_are_assumed():
    assert predicted(kind="v5p").seconds == pytest.approx(predicted().seconds * 1.5 / 1.75 / 2)


@pytest.mark.parametrize(
    ("schedule", "grid", "moved", "bound"),
    [
        (Schedule((Region(1000, 1000, 0),), 100, 0), Grid(16, 10, 4), 0, "MXU"),
        (Schedule((Region(1000, 999, 0),), 100, 0), Grid(16, 10, 4), 0, "schedule"),
        (Schedule((Region(1000, 999, 0),), 100, 0), Grid(160, 10, 4), 0, "grid"),
        (Schedule((Region(1000, 999, 0),), 100, 4000), Grid(16, 10, 4), 0, "grid"),
        (Schedule((Region(1000, 1000, 0),), 100, 0), Grid(16, 10, 4), 1e8, "memory"),
    ],
)
def test_what_takes_longest_is_the_bound(schedule, grid, moved, bound):
    assert predicted(schedule, grid, moved).bound == bound


def test_memory_delivers_its_published_bandwidth():
    assert predicted(moved=1e9).seconds == pytest.approx(1e9 / DEVICE_RATES["v5e"].bandwidth)


@pytest.mark.parametrize("kind", [None, "v4", "unknown"])
def test_a_device_without_a_clock_is_not_predicted(kind):
    found = predicted(kind=kind)
    assert (found.seconds, found.bound, found.schedule) == (None, "", PLAIN)


@pytest.mark.parametrize("kind", CLOCKS)
def test_clocks_give_the_published_flops_with_the_matrix_units_of_the_schedules(kind):
    """Four units of 128 × 128 a core; two of 256 × 256 that take two rows a cycle."""
    columns = 4 * 128 * 128 if kind in {"v5e", "v5p"} else 2 * 2 * 256 * 256
    flops = CLOCKS[kind] * CORES.get(kind, 1) * columns * 2
    assert flops == pytest.approx(DEVICE_RATES[kind].flops, rel=0.01)


sizes = st.integers(min_value=0, max_value=1000)
regions = st.builds(Region, st.integers(1, 5000), sizes, sizes)
schedules = st.builds(Schedule, st.lists(regions, min_size=1, max_size=3).map(tuple), sizes, sizes)


@st.composite
def grids(draw):
    steps = draw(st.integers(1, 1000))
    visited = draw(st.integers(0, steps))
    return Grid(steps, visited, draw(st.integers(0, steps)), draw(st.integers(0, visited)))


@given(schedules, grids(), st.sampled_from([*CLOCKS]), st.integers(0, 10**9))
def test_more_of_anything_is_never_faster(schedule, grid, kind, moved):
    first = predicted(schedule, grid, moved, kind).seconds
    more = [
        (schedule, dataclasses.replace(grid, steps=grid.steps + 1)),
        (schedule, dataclasses.replace(grid, steps=grid.steps + 1, visited=grid.visited + 1)),
        (schedule, dataclasses.replace(grid, rows=min(grid.rows + 1, grid.steps))),
        (schedule, dataclasses.replace(grid, cut=min(grid.cut + 1, grid.visited))),
        (dataclasses.replace(schedule, overhead=schedule.overhead + 1), grid),
        (dataclasses.replace(schedule, row=schedule.row + 1), grid),
    ]
    assert all(predicted(*each, moved, kind).seconds >= first for each in more)
    assert predicted(schedule, grid, moved + 1000, kind).seconds >= first


@given(schedules, grids(), st.sampled_from([*CLOCKS]))
def test_twice_the_grid_takes_twice_as_long(schedule, grid, kind):
    assume(grid.steps >= CORES.get(kind, 1))  # one step leaves a core idle
    twice = Grid(2 * grid.steps, 2 * grid.visited, 2 * grid.rows, 2 * grid.cut)
    assert predicted(schedule, twice, 0, kind).seconds == pytest.approx(2 * predicted(schedule, grid, 0, kind).seconds)


@pytest.mark.parametrize(
    "counts", [(4, 5, 1, 0), (4, 2, 5, 0), (4, 2, 1, 3), (4, -1, 1, 0), (4, 2, -1, 0), (4, 2, 1, -1)]
)
def test_a_grid_has_no_more_parts_than_steps(counts):
    with pytest.raises(ArgumentError, match="must hold, and none may be negative"):
        Grid(*counts)


def test_a_prediction_is_plain_data_that_says_what_it_is():
    found = json.loads(json.dumps(predicted().to_json()))
    assert found["kind"] == "static, not measured"
    assert found["schedule"]["bodies"][1]["cycles"] == 1200
    assert found["grid"]["visited"] == 10
    assert {field.name for field in dataclasses.fields(KernelSpeed)} < found.keys()


def test_the_assumptions_say_that_clocks_are_not_published():
    assert any("clocks are not published" in text for text in ASSUMPTIONS)
