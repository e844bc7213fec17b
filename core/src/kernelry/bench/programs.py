"""The programs of a case: one for each kernel that serves it, for `auto` and for peers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, final

import jax
import jax.numpy as jnp

from kernelry.aot.layers import attention_of, differentiated
from kernelry.bench.cases import Case, Pass
from kernelry.bench.peers import Peer
from kernelry.bench.results import Kind, Outcome, Row
from kernelry.errors import KernelryError, NoKernelError
from kernelry.kernel.refusal import RefusalCode
from kernelry.kernel.spec import AUTO
from kernelry.policy.scope import record, use
from kernelry.resolution.explanation import Candidate, Resolution
from kernelry.resolution.resolver import explain


@final
@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Lowered:
    """A program that is not compiled yet.

    Args:
      name: the kernel's, `auto` or the peer's.
      kind: whose attention it is.
      program: what `jax.jit(…).lower` returned.
      text: of the program, the same for equal programs.
      resolution: of kernels and `auto`.
      note: a remark for its row.
    """

    name: str
    kind: Kind
    program: Any
    text: str
    resolution: Resolution | None = None
    note: str = ""

    def row(self, outcome: Outcome, reason: str = "", **more: Any) -> Row:
        """Its row."""
        return Row(self.name, self.kind, outcome, reason or self.note, self.resolution, **more)


def kernels_of(case: Case, named: Sequence[str] = ()) -> tuple[list[str], list[Row]]:
    """The names of the kernels to time, and rows for those that refuse or are not considered.

    Args:
      case: the case.
      named: the kernels to time; none means all that the policy of the case allows.
    """
    if named:
        asked = {name: explain(case.request, kernel=name, policy=case.policy, changes=False) for name in named}
        found = [next(each for each in answer.candidates if each.name == name) for name, answer in asked.items()]
        excluded: tuple[str, ...] = ()
    else:
        resolution = explain(case.request, policy=case.policy, changes=False)
        found, excluded = list(resolution.candidates), resolution.excluded
    rows = [Row(each.name, Kind.KERNEL, Outcome.REFUSED, _reasons(each)) for each in found if each.refusals]
    rows += [Row(name, Kind.KERNEL, Outcome.REFUSED, "excluded by the rules of the config") for name in excluded]
    return [each.name for each in found if not each.refusals], rows


def missing_kernel(case: Case, named: Sequence[str]) -> Resolution | None:
    """The resolution that says that a named kernel is not installed; None where all are."""
    for name in named:
        answer = explain(case.request, kernel=name, policy=case.policy, changes=False)
        for each in answer.candidates:
            if any(refusal.code is RefusalCode.NOT_INSTALLED for refusal in each.refusals):
                return answer
    return None


def _reasons(candidate: Candidate) -> str:
    return "; ".join(str(refusal) for refusal in candidate.refusals)


def lowered_kernel(case: Case, name: str, arguments: tuple[Any, ...]) -> Lowered:
    """The program of a kernel, or of `auto`, after looking whether the kernel's work is in it.

    Raises:
      Exception: what the kernel raises, or what JAX does of it.
    """
    scope = use(policy=case.policy) if name == AUTO else use(name, policy=case.policy)
    with scope, record() as found:
        program = jax.jit(of_pass(case, attention_of(case.call))).lower(*arguments)
    found[-1].verify(program)
    kind = Kind.AUTO if name == AUTO else Kind.KERNEL
    return Lowered(name, kind, program, program.as_text(), found[-1])


def lowered_peer(case: Case, peer: Peer, arguments: tuple[Any, ...]) -> Lowered:
    """The program of a peer that can compute the case.

    Raises:
      Exception: what JAX raises.
    """
    program = jax.jit(of_pass(case, peer.attention_of(case))).lower(*arguments)
    return Lowered(peer.name, Kind.PEER, program, program.as_text(), note=peer.note(case.mask_of(arguments)))


def of_pass(case: Case, attend: Callable[..., Any]) -> Callable[..., Any]:
    """Attention as a function of the arguments of a case: its result, or Σ out · weights with its gradients."""

    def forward(*arguments: Any) -> Any:
        return attend(*arguments[:6])

    def loss(*arguments: Any) -> Any:
        found, weights = attend(*arguments[:6]), arguments[6]
        out = found[0] if case.request.max_logits else found
        return (out.astype(jnp.float32) * weights.astype(jnp.float32)).sum()

    if case.which is not Pass.BOTH:
        return forward
    return jax.value_and_grad(loss, argnums=differentiated(case.request))


def words_of(error: BaseException, most: int = 300) -> str:
    """An error in a line."""
    own = str(error) if isinstance(error, KernelryError) else f"{type(error).__name__}: {error}"
    line = "; ".join(part.strip() for part in own.splitlines() if part.strip())
    return line if len(line) <= most else f"{line[:most]}…"


def outcome_of(error: BaseException) -> Outcome:
    """Whether an error says no, or something is wrong."""
    return Outcome.REFUSED if isinstance(error, NoKernelError) else Outcome.FAILED
