"""`Emended`: any optimizer's steps taken in coordinates in which a unit step has a unit consequence."""

from __future__ import annotations

import inspect
import math
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import _torch
from ..options import check_choice
from ..solve.gram import Gram
from ..solve.root import Kind
from ..solve.root import method as root_method
from . import memory
from .checks import (
    check_converted,
    check_decay,
    check_model,
    check_moved,
    check_one_process,
    check_optimizer,
    check_outputs,
    check_process_group,
    check_root,
    check_shard_state,
    check_weights,
    checked_numbers,
    checked_outputs,
    warn_of_other_coordinates,
    warn_of_unseen,
)
from .inside import (
    OwnStep,
    Part,
    Rooted,
    hooks_around,
    moved,
    parts_of,
    root_outputs,
    step_all,
    step_weight_by_weight,
    turn,
    without_gradients,
)
from .join import JoinHook, notify
from .outputs import KEYS as OUTPUT_KEYS
from .outputs import Outputs
from .record import Recorder
from .rules import defaults_of, rule_of
from .sharding import Sharding, groups_of
from .steps import rule_for
from .units import Unit, find_units

SCALES = ("auto", "gradient", "nlms")
FULL_GRAPH = "consequentialism.optim.Emended.step: what it does depends on the host's counts"


class Emended(torch.optim.Optimizer):
    """An optimizer that wraps another one and takes its steps on the layers' weights in emended coordinates.

    A step ``dW`` changes a layer's outputs by ``x dW^T``, whose mean square is ``tr(dW A dW^T)`` with the second moment
    ``A = E[x^T x]`` of the layer's input. In the coordinates ``V = W (A + c I)^(1/2)`` a step of length one changes the
    outputs by one. The wrapped optimizer works in such coordinates: it gets the preconditioned gradient ``g S``, and
    what it adds is multiplied by ``S^T``,

        S S^T = ((A + c I) / t)^-2s,    t = trace(A) / I,    c = damping * t,    W <- W + u S^T.

    ``A`` is a mean over the rows of the batches in memory. It is taken in forward on one step in ``refresh_every``;
    between these a step costs two products a layer. Gradients are the plain ones until ``step()``, so clipping,
    accumulation, loss scaling, DDP and FSDP2 work as usual, and a step over k micro-batches with ``memory=0`` is
    exactly the step of their union. Served are linear layers, convolutions, transposed ones, `transformers`' ``Conv1D``
    and embeddings, with a layer's bias as an input that is always 1, and of attentions and recurrent layers the
    projections of their own input. `left_alone` names the other layers; the wrapped optimizer steps them plainly.

        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        optimizer = cw.optim.Emended(optimizer, model)

    The state is in ``optimizer.state[weight]``, beside the wrapped optimizer's own: ``input_gram``, ``root``,
    ``gram_rows`` and ``emended_steps``. Weight decay acts on ``W``: decoupled decay as in the wrapped class, coupled
    decay as a part of the gradient before ``S``. Nothing is recorded in eval mode, under ``no_grad``, or of a batch
    whose Gram is not finite.

    Make it before `torch.compile` traces a forward, because it adds hooks. A compiled forward counts its batch at once,
    an eager one when its backward runs. `step` runs outside of compiled graphs. A CUDA graph may hold the steps between
    refreshes, of which the host reads nothing: capture while `is_recording` is False, with an ``output_exponent`` not
    before ``refresh_every`` steps, and call `replayed` after each replay.

    Args:
        optimizer: Any `torch.optim.Optimizer` that takes dense gradients and calls no closure within its step. It
            shares its parameter groups and state with this one; use only this one.
        model: The model of whose parameters the optimizer has all or some.
        damping: The ridge relative to ``t``, above 0. ``math.inf`` gives ``S = I``, the plain optimizer bit for bit.
        exponent: ``s``, above 0 and at most 1. None: 1/2, or 1/4 for optimizers that orthogonalise, such as Muon.
        scale: ``"gradient"``: as above, so that rates carry over from the plain optimizer. ``"nlms"``: without the
            division by ``t``, so that the rate of SGD is NLMS's dimensionless step size; ``A`` then counts a
            convolution's samples, not its rows. ``"auto"``: ``"nlms"`` for `torch.optim.SGD`, else ``"gradient"``.
        memory: The factor of older rows at a refresh, at least 0 and below 1.
        refresh_every: The number of steps from one refresh of ``A`` and ``S`` to the next, at least 1. None: 10, or 25
            for optimizers that orthogonalise, to which stale roots cost nothing. Earlier in a run there is a refresh
            after 0, 1, 2, 4, 8, ... steps, because inputs change fast at first: roots of the first batch alone would
            leave Adam second moments of another scale. A layer whose first gradients come between refreshes waits one
            step for a refresh; with several processes, until one is due.
        block: The most inputs whose moments are taken together. The ``A`` of a wider layer is cut into diagonal blocks,
            that of a convolution between channels where they divide. None: 256, or 128 for optimizers that
            orthogonalise. A step's two products cost ``4 O I block`` operations.
        process_group: ``"auto"``: the ranks that share the weights, which are a DTensor's mesh, DDP's group, or the
            default group where torch.distributed is initialised. Else a group, or None for one process. On refresh
            steps the Grams are summed over it; nothing else is sent without ``shard_state``. Where ranks run out of
            batches before others, use `torch.distributed.algorithms.Join` over DDP and this optimizer.
        shard_state: Whether only one rank of the group keeps each ``A`` and ``S`` and makes the root, as in distributed
            Shampoo (in a mesh of several dimensions, one of the last dimension's group). On refresh steps each Gram is
            summed to its owner. In every step each ``S`` is sent to all ranks, so all ranks step together, and a rank
            has at most two roots beside its own at a time. Each is sent once with torch's SGD, RMSprop, Adam, AdamW and
            Muon, and with `Muon`, and twice with other optimizers, before and after their step. The Grams of a refresh
            step are added up where their rows are, so they are on every rank from forward to that step. The weights are
            those of ``shard_state=False``. A checkpoint holds the whole state and resumes with any number of ranks,
            sharded or not: see `consolidate_state_dict`.
        root: ``"symmetric"``: ``S = ((A + c I) / t)^-s``. ``"cholesky"``, only for ``s = 1/2``: the triangular ``L^-T``
            of ``(A + c I) / t = L L^T``, which takes a fifth of the time on the CPU. For SGD and Muon without momentum
            both give the same steps; for other optimizers it is another method. ``"auto"``: Cholesky's on the CPU where
            the steps are the same, else the symmetric root. A loaded root of the other kind stays until the next
            refresh; moments stay as they are.
        filter_fn: ``filter_fn(module, fully_qualified_name)`` says which layers to step in coordinates; None, all.
        output_exponent: ``q``. Above 0, outputs get a root too, ``L = ((B + c I) / t)^-q`` with the second moment ``B``
            of ``g S`` over blocks of 64 of a weight's outputs, except for embeddings and depthwise weights. The wrapped
            optimizer gets ``L g S``, and ``W <- W + L u S^T``. 1/4 is Shampoo's (Gupta et al., 2018). ``L`` is made
            when ``S`` is, and in each of the first ``refresh_every`` steps. Not for sharded weights or ``shard_state``.
        output_damping: ``c`` relative to the mean eigenvalue of ``B``, above 0.

    Raises:
        TypeError: An argument of the wrong type.
        ValueError: An argument out of its range; an optimizer that cannot be wrapped; a model of whose layers it has no
            weight; a weight that two layers use differently; a weight decay of which nothing is known (see `declare`).
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: nn.Module,
        *,
        damping: float = 0.03,
        exponent: float | None = None,
        scale: Literal["auto", "gradient", "nlms"] = "auto",
        memory: float = 0.95,
        refresh_every: int | None = None,
        block: int | None = None,
        process_group: Any = "auto",
        shard_state: bool = False,
        root: Kind = "auto",
        filter_fn: Callable[[nn.Module, str], bool] | None = None,
        output_exponent: float = 0.0,
        output_damping: float = 0.1,
    ) -> None:
        check_optimizer(optimizer)
        check_model(model, filter_fn)
        given = damping, exponent, memory, refresh_every, block
        damping, exponent, memory, refresh_every, block = checked_numbers(*given)
        check_choice("scale", scale, SCALES)
        check_process_group(process_group)
        check_shard_state(shard_state, process_group, optimizer)
        self.output_exponent, self.output_damping = checked_outputs(output_exponent, output_damping)
        check_outputs(self.output_exponent, damping, shard_state)
        rule = rule_of(optimizer)
        default = defaults_of(rule)
        if scale == "auto":
            scale = "nlms" if isinstance(optimizer, torch.optim.SGD) else "gradient"
        self.damping, self.scale, self.memory, self.process_group = damping, scale, memory, process_group
        self.exponent = default.exponent if exponent is None else exponent
        check_root(root, self.exponent)
        self.root: Kind = root
        self.refresh_every = default.refresh_every if refresh_every is None else refresh_every
        self.block = default.block if block is None else block
        own = Outputs(self.output_exponent, self.output_damping, memory)
        self.outputs = own if self.output_exponent else None
        self._rule, self._name = rule, type(optimizer).__name__
        self._model, self.filter_fn, self.shard_state = model, filter_fn, shard_state
        self._own_step = rule_for(optimizer)
        self._sharding = Sharding(self._process_groups) if shard_state else None
        self._recorder = Recorder()
        self._steps = torch.zeros((), dtype=torch.int64)
        self.units: list[Unit] = []
        self.left_alone: dict[str, str] = {}
        groups = optimizer.param_groups
        super().__init__([dict(group) for group in groups], dict(optimizer.defaults))
        self.optimizer = optimizer
        del self.__dict__["_base_groups"], self.__dict__["_base_state"]
        optimizer.register_step_pre_hook(OwnStep(self))
        self._attach()
        weakref.finalize(self, self._recorder.detach)

    # That of a fused optimizer inside would keep GradScaler from unscaling, and from skipping what is not finite.
    _step_supports_amp_scaling = False

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The groups of the optimizer inside."""
        return self.__dict__["optimizer"].param_groups if "optimizer" in self.__dict__ else self._base_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        if "optimizer" in self.__dict__:
            self.optimizer.param_groups = groups
        else:
            self._base_groups = groups

    @property
    def state(self) -> defaultdict[Tensor, Any]:  # type: ignore[override]
        """The state of the optimizer inside, with ours beside it."""
        return self.__dict__["optimizer"].state if "optimizer" in self.__dict__ else self._base_state

    @state.setter
    def state(self, state: defaultdict[Tensor, Any]) -> None:
        if "optimizer" in self.__dict__:
            self.optimizer.state = state
        else:
            self._base_state = state

    def __getattr__(self, name: str) -> Any:
        """An attribute of the optimizer inside, such as a schedule-free one's ``train()`` and ``eval()``."""
        optimizer = self.__dict__.get("optimizer")
        if optimizer is None or name.startswith("__"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        value = getattr(optimizer, name)
        return self._moving(value) if name in ("train", "eval") and callable(value) else value

    def _moving(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """A method that moves parameters, in coordinates."""

        @torch.no_grad()
        def move(*args: Any, **kwargs: Any) -> Any:
            if self._rule.reads != "position" or not self.units:
                return method(*args, **kwargs)
            return moved(self.optimizer, self.units, self._states(), self._rule, lambda: method(*args, **kwargs))

        return move

    def _attach(self) -> None:
        """Find the layers, and hook those that are new."""
        owned = {id(p) for group in self.param_groups for p in group["params"]}
        if not owned & {id(p) for p in self._model.parameters()}:
            raise ValueError("model: the optimizer has none of its parameters; give both the same model")
        if math.isinf(self.damping):
            return
        with_biases, before = not self._rule.orthogonalises, {id(unit.own): unit for unit in self.units}
        self.units, self.left_alone = find_units(self._model, owned, self.filter_fn, self.block, with_biases)
        if not self.units:
            why = "; ".join(f"{name or '(the model itself)'}: {reason}" for name, reason in self.left_alone.items())
            raise ValueError(f"model: it has no layer that can be stepped in coordinates. {why}".rstrip())
        for unit in self.units:
            unit.succeed(before.get(id(unit.own)))
        check_converted(self.units)
        groups = {id(p): group for group in self.param_groups for p in group["params"]}
        check_decay(self.units, groups, self._rule, self._name)
        check_one_process(self.units, self._model, self.process_group)
        if self.outputs is not None:
            self.outputs.check(self.units)
        self._recorder.one_process = self.process_group is None
        self._hook()
        if self._is_due():
            self._recorder.begin()

    def _hook(self) -> None:
        """Put hooks on the layers of all units, and on no others."""
        own = type(self).__name__
        name = f"{own}({self._name})" if type(self) is Emended else own
        self._recorder.attach(self.units, self.scale == "nlms", name)

    def _is_due(self) -> bool:
        return memory.steps_to_refresh(int(self._steps), self.refresh_every) == 0

    def _outputs_alone_due(self) -> bool:
        return self.outputs is not None and int(self._steps) < self.refresh_every

    @property
    def is_recording(self) -> bool:
        """Whether forwards are recorded now, for the next step refreshes ``A`` and ``S``."""
        return self._recorder.recording

    def replayed(self, steps: int = 1) -> None:
        """Count steps that a CUDA graph took, which the host has not seen; no refresh may be due within them.

        Raises:
            ValueError: A refresh is due before that.
        """
        if isinstance(steps, bool) or not isinstance(steps, int):
            raise TypeError(f"steps must be an integer of at least 1, got {steps!r} ({type(steps).__name__})")
        eagerly = self._outputs_alone_due() or self.is_recording  # as for layers that are new
        left = 0 if eagerly else memory.steps_to_refresh(int(self._steps), self.refresh_every)
        if self.units and not 1 <= steps <= left:
            due = "a refresh is due" if left or self.is_recording else "the outputs' roots are due"
            allowed = f"at least 1 and at most {left}, where {due}" if left else f"taken eagerly now, where {due}"
            raise ValueError(f"steps must be {allowed}, got {steps}")
        self._count(steps)

    def _count(self, steps: int) -> None:
        self._steps.fill_(int(self._steps) + steps)  # of a tensor, in place: the states share it
        if self.units and self._is_due():
            self._recorder.begin()

    def _states(self) -> list[memory.State]:
        """Each weight's state, with ours in it."""
        states = []
        for unit in self.units:
            state = self.state[unit.weight]
            if "emended_steps" not in state:
                fresh = memory.fresh_state if self._sharding is None else self._sharding.fresh_state
                state.update(fresh(unit), emended_steps=self._steps)
                unit.slot.kept = True
            if self.outputs is not None:
                self.outputs.complete(unit, state)
            states.append(state)
        return states

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Take one step.

        Args:
            closure: Evaluates the model again and returns the loss; called once, with gradients on.

        Returns:
            The closure's loss, or None.
        """
        return step_outside_graphs(self, closure) if torch.compiler.is_compiling() else self._step(closure)

    @torch.no_grad()
    def _step(self, closure: Callable[[], Any] | None) -> Any:
        if not self.units:
            return self.optimizer.step() if closure is None else self.optimizer.step(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        check_weights(self.units)
        check_moved(self.units, self.state)
        states = self._states()
        recorder = self._recorder
        notify(self, recorder.wrapper and recorder.wrapper())
        due = recorder.recording
        ran = due and recorder.ran()
        capturing = _torch.is_capturing()
        if (due or self._outputs_alone_due()) and capturing:
            raise RuntimeError(
                "consequentialism.optim.Emended refreshes its roots in this step, which a CUDA graph cannot hold: take "
                "it eagerly where is_recording says so (with an output_exponent the first refresh_every ones too), and "
                "capture one between refreshes"
            )
        unseen = self._unmet() if due and (ran or self._rates_count()) else []
        waiting = [] if due else self._unmet()
        # Ranks refresh together, one on which no layer ran too.
        refreshes = due and (ran or bool(self._process_groups() and self._rates_count()))
        if refreshes:
            self._refresh(states)
        if unseen:
            self._name_unseen(unseen)
        hidden = [p for unit in waiting for p in (unit.weight, unit.bias) if p is not None]
        with hooks_around(self.optimizer), without_gradients(hidden):
            groups = {id(p): group for group in self.param_groups for p in group["params"]}
            parts = parts_of(self.units, states, groups, self._rule, self.optimizer)
            if self.outputs is not None and (refreshes or self._outputs_alone_due()):
                root_outputs(self.optimizer, parts, self.outputs, int(self._steps) + 1)
            rooted: Rooted = iter
            if self._sharding is not None:
                parts, rooted = self._sharding.in_order(parts), self._rooted
            if self._own_step is not None:
                step_weight_by_weight(self.optimizer, parts, self._own_step, rooted)
            else:
                step_all(self.optimizer, parts, states, self._rule, rooted)
        for part in parts:
            part.unit.stepped_as = part.parameters[0].dtype, part.parameters[0].device
        if waiting and not self._process_groups():  # over several, ranks might not agree
            recorder.begin()
        # Where a checkpoint's place is made there was no forward yet, and the refresh is still due.
        if not capturing and refreshes == due:
            self._count(1)
        return loss

    @property
    def join_device(self) -> torch.device:
        """For `torch.distributed.algorithms.Join`."""
        return self.units[0].slot.device

    @property
    def join_process_group(self) -> Any:
        """For `torch.distributed.algorithms.Join`: the group over which Grams are summed."""
        return (self._process_groups() or [dist.group.WORLD])[0]

    def join_hook(self, **_: Any) -> JoinHook:
        """For `torch.distributed.algorithms.Join`: ranks without batches keep up with those that have some."""
        return JoinHook(self)

    @torch.no_grad()
    def step_without_rows(self) -> None:
        """A step of a rank whose batches have ended, while others step: it takes part in a refresh, and counts."""
        if self._recorder.recording:
            self._refresh(self._states())
        if self._sharding is not None:
            for _ in range(2 if self._own_step is None else 1):
                list(self._rooted([]))
        self._count(1)

    def _refresh(self, states: Sequence[memory.State]) -> None:
        if self._sharding is not None:
            self._sharding.refresh(self.units, states, self.memory, self._roots)
        else:
            memory.refresh(self.units, states, self.memory, self._roots, self._process_groups())
        self._recorder.end()

    def _rooted(self, parts: Sequence[Part]) -> Iterator[Part]:
        """With ``shard_state``, the parts with their roots, as they come from the ranks that keep them."""
        assert self._sharding is not None
        return self._sharding.rooted(self.units, self._states(), parts)

    def _rates_count(self) -> bool:
        """Whether this is a step that somebody wants: a checkpoint's place is made by one with all rates 0."""
        rates = [group.get("lr", 1) for group in self.param_groups]
        return any(rate.device.type != "cpu" or bool(rate) if isinstance(rate, Tensor) else rate != 0 for rate in rates)

    def _unmet(self) -> list[Unit]:
        """The layers that have gradients for the first time, or had their first ones between refreshes."""
        return [unit for unit in self.units if not unit.met and unit.weight.grad is not None]

    def _name_unseen(self, units: Sequence[Unit]) -> None:
        """Warn, once, of those that no rank has recorded in a refresh."""
        unseen = [unit.name for unit in units if float(self.state[unit.weight]["gram_rows"]) == 0]
        for unit in units:
            unit.met = True
        warn_of_unseen(unseen, stacklevel=7)

    def _roots(self, units: Sequence[Unit], moments: Sequence[Gram]) -> list[Tensor]:
        """``S`` of each ``A``, all of one shape, with the stored shape."""
        device = moments[0].matrix.device.type
        turned = self.root == "auto" and device == "cpu" and turn(self.optimizer, self.units, self._rule)
        method = root_method(self.exponent, device, self.root, turned)
        return memory.roots_of(units, moments, (self.damping, self.exponent, self.scale == "gradient"), method)

    def _process_groups(self) -> list[Any]:
        return groups_of(self.process_group, self.units, self._model)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients and forget the rows counted with them since the last step; `model.zero_grad()` cannot."""
        self._recorder.discard()
        self.optimizer.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters; layers whose weights are among them are stepped in coordinates too, from a refresh on."""
        if "optimizer" not in self.__dict__:  # torch's own constructor
            super().add_param_group(param_group)
            return
        recording, before = self._recorder.recording, (self.units, self.left_alone)
        self.optimizer.add_param_group(param_group)
        try:
            self._attach()
        except Exception:
            self.optimizer.param_groups.pop()
            self.units, self.left_alone = before
            self._hook()
            if recording:
                self._recorder.begin()
            raise
        shapes = {id(unit.weight): unit.stored_shape() for unit in before[0]}
        known = [unit for unit in self.units if id(unit.weight) in shapes]
        changed = [unit for unit in known if unit.stored_shape() != shapes[id(unit.weight)]]
        for unit in changed:  # a bias that has come or gone changes the order
            for key in memory.KEYS:
                self.state[unit.weight].pop(key, None)
            recording = True
        if self._sharding is not None:
            self._sharding.forget(changed)
        if (recording or len(self.units) > len(before[0])) and not self._recorder.recording:
            self._recorder.begin()

    def consolidate_state_dict(self, to: int | None = 0) -> None:
        """With ``shard_state``, bring the whole state to the CPU of rank ``to`` of the group, None: of every rank.

        All ranks call it, before `state_dict` on that rank, or on all, as `torch.distributed.checkpoint` does; it
        holds until the next step. (The name is that of `torch.distributed.optim.ZeroRedundancyOptimizer`.) All ranks
        then load what was saved. Without ``shard_state`` every rank has all, and nothing happens.

        Raises:
            ValueError: There is no such rank.
        """
        if self._sharding is None:
            return
        if to is not None and (isinstance(to, bool) or not isinstance(to, int) or not 0 <= to < self._sharding.ranks()):
            raise ValueError(f"to must be a rank from 0 to {self._sharding.ranks() - 1}, or None, got {to!r}")
        self._sharding.consolidate(self.units, self._states(), to)

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's, with ours in each weight's state.

        Raises:
            RuntimeError: With ``shard_state``, `consolidate_state_dict` was not called since the last step.
        """
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        state_dict = self.optimizer.state_dict()
        if self._sharding is not None:
            own = [p for group in self.param_groups for p in group["params"]]
            self._sharding.complete(state_dict, self.units, own)
        for after in self._optimizer_state_dict_post_hooks.values():
            changed = after(self, state_dict)
            state_dict = state_dict if changed is None else changed
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave, also with another ``refresh_every``, ``damping`` or ``memory``.

        A state of the plain optimizer is taken with a warning: the coordinates then begin anew. So is one with outputs'
        roots where there are none here, or without them.

        Raises:
            ValueError: A state that does not fit, or with NaN or infinity in the memory; nothing is then changed.
        """
        state_dict = dict(state_dict)
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            changed = before(self, state_dict)
            state_dict = state_dict if changed is None else changed
        loaded = self._checked(state_dict)
        rest = {
            key: {k: v for k, v in value.items() if k not in (*memory.KEYS, *OUTPUT_KEYS)}
            if isinstance(value, dict)
            else value
            for key, value in state_dict["state"].items()
        }
        self.optimizer.load_state_dict({**state_dict, "state": rest})
        if loaded is not None:
            self._install(loaded)
        elif self.units:
            self._begin_anew()
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def _checked(self, state_dict: dict[str, Any]) -> list[memory.State] | None:
        """Ours of a state, for each unit, on its device; None where there is none, or nothing is in coordinates."""
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        own = [p for group in self.param_groups for p in group["params"]]
        if len(saved) != len(own):
            return None  # torch's own error
        numbers = {id(p): i for i, p in zip(saved, own, strict=True)}
        loaded = memory.loaded_states(self.units, numbers, state_dict["state"])
        if self.outputs is not None and loaded:
            theirs = [state_dict["state"][numbers[id(unit.weight)]] for unit in self.units]
            own_of = zip(self.units, loaded, theirs, strict=True)
            loaded = [state | self.outputs.checked_state(unit, before) for unit, state, before in own_of]
        warn_of_other_coordinates(state_dict["state"], bool(loaded), bool(self.units), self.output_exponent)
        return loaded or None

    def _begin_anew(self) -> None:
        """Forget the coordinates: the next step refreshes them, as the first one does."""
        self._steps = torch.zeros((), dtype=torch.int64)
        for unit in self.units:
            unit.met = unit.slot.kept = False
            unit.stepped_as = None
        if self._sharding is not None:
            self._sharding.forget(self.units)
        self._recorder.end()
        self._recorder.begin()

    def _install(self, loaded: Sequence[memory.State]) -> None:
        """Take checked states; what is equal is one again."""
        self._steps = torch.tensor(max(int(state["emended_steps"]) for state in loaded), dtype=torch.int64)
        known: list[memory.State] = []
        for unit, state in zip(self.units, loaded, strict=True):
            same = next((other for other in known if memory.same(state, other)), state)
            if same is state:
                known.append(state)
            shared = {key: same[key] for key in memory.KEYS}
            self.state[unit.weight].update({**state, **shared, "emended_steps": self._steps})
            unit.slot.follow(unit.weight)
            unit.met, unit.slot.kept, unit.stepped_as = float(state["gram_rows"]) > 0, True, None
        if self._sharding is not None:
            self._sharding.keep(self.units, self._states())
        self._recorder.end()
        if self._is_due():
            self._recorder.begin()

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            "consequentialism.optim.Emended cannot be copied or pickled, it belongs to its model; save its state_dict()"
        )

    def __repr__(self) -> str:
        names = inspect.getfullargspec(Emended.__init__).kwonlyargs
        options = ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
        return f"{type(self).__name__}({options}) of {self.optimizer!r}"


def step_outside_graphs(optimizer: Emended, closure: Callable[[], Any] | None) -> Any:
    """`Emended.step` without torch.compile, which leaves this out of its graphs."""
    return torch.compiler.disable(optimizer._step, reason=FULL_GRAPH)(closure)


_torch.never_inlined(step_outside_graphs, FULL_GRAPH)
