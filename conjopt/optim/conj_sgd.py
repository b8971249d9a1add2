"""ConjSGD: the loop of one step, watch -> measure -> decide -> step."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from conjopt.bounds import ConvergenceLedger
from conjopt.measure.curvature import JacobianProduct
from conjopt.measure.observation import Batch
from conjopt.measure.process_group import Joined
from conjopt.measure.shards import reshard
from conjopt.measure.watch import Watch
from conjopt.optim import checks, measuring, other_terms
from conjopt.optim.batch_rule import BatchAdvisor, BatchRule, Recommendation
from conjopt.optim.batch_rule import batch_rule as rule_of
from conjopt.optim.blocks import Blocks
from conjopt.optim.conditions import conditions
from conjopt.optim.directions import ByGroup, Direction
from conjopt.optim.floor import DataFloor
from conjopt.optim.gate import Gate, choose
from conjopt.optim.journal import Journal
from conjopt.optim.memory import Memory
from conjopt.optim.recording import Recording
from conjopt.optim.saving import Saved
from conjopt.optim.scaling import unscaled_by
from conjopt.optim.statistics import Statistics
from conjopt.optim.status import Status
from conjopt.optim.step_size import StepRule
from conjopt.optim.user_frame import levels_to_the_user
from conjopt.potentials import Logistic, Softmax

__all__ = ["ConjSGD"]


class ConjSGD(Saved):
    """SGD whose step size follows from what the loop shows: no learning rate to tune.

    A step is ``theta <- theta (1 - min(weight_decay a, max_decay)) - a u``, with ``u`` of the
    direction and ``a`` the least of three limits, times ``lr``: the edge step ``s max(N, rho_min
    S) / q`` (Thm 3.2), the Polyak cap ``L / S`` over the data floor (Thm 3.5) and the trust region
    ``tau sqrt(2 L / beta) / V`` (Thm 3.6). On measuring steps, each of the first ``warmup`` and
    every ``measure_every``-th, ``u`` is made from the odd samples of the batch, and its slope ``N``
    on the even ones is unbiased; curvature ``q`` and output change ``V`` come from one forward-mode
    product. The step is then tried on these samples, and cut if the outputs really change by more
    than ``realised`` times the trust region's radius, as they do far from the linearisation.

    The loop is an ordinary torch loop; hooks on ``model`` and ``loss`` watch it. Samples lie along
    dimension 0 of the model's outputs. See docs/how_it_works.md.

    Args:
        params: parameters, named parameters or groups of them, all of ``model``.
        model: the module that the loop calls, or the module that its DistributedDataParallel wraps.
        loss: the criterion that the loop calls: `torch.nn.CrossEntropyLoss`, `MSELoss`,
            `BCEWithLogitsLoss` or a `conjopt.losses.FenchelYoungLoss`, reduced by mean or sum.
        lr: dimensionless factor of the step, 1.0 for what the theory says; schedulers act on it.
            Where groups differ, their ratio is part of the direction. The step itself under
            ``step_rule="constant"``.
        momentum: in [0, 1).
        nesterov: look ahead by one gradient; ignored at momentum 0.
        weight_decay: decoupled, per unit of step; None for 0.1 with ``direction="spectral"`` over
            softmax and logistic losses, which have no minimizer, and 0 otherwise.
        direction: "spectral" (orthogonalised momentum), "sgd", or a `Direction`. A group may have
            another: "sgd" where the optimizer's is "spectral", and any under
            ``step_rule="constant"``.
        step_rule: "edge" (the limits above; for "sgd" `GradientEdge`, which goes by the greatest
            curvature of the batch), "constant", or a `StepRule`, whose arguments are ``s``,
            ``rho_min``, ``tau`` and ``realised``. For "sgd" also "smoothness", ``1/(2L)`` of
            Thm 3.1, and "polyak" (Thm 3.5), to the letter with ``momentum=0``.
        batch_rule: what `recommended_batch_size` goes by: "correlation", "work", "fixed", a
            `BatchRule`, or None for no opinion.
        measure_every: steps from one measurement to the next.
        warmup: first steps, each of which measures.
        data_floor: in the criterion's units, the least training loss that the data allow (Thm 1.3);
            "auto" for the entropy of soft or smoothed targets.
        max_step: cap of the actual step; None for none.
        average: share of the run that the tail average reaches back, see `averaged`; 0 for none.
        maximize: as in torch; only under ``step_rule="constant"``.
        foreach: multi-tensor kernels for scaling and checking gradients; None for on a GPU.
        dampening: of ``direction="sgd"``, as in torch.
        coupled_weight_decay: add ``weight_decay theta`` to the gradient, as `torch.optim.SGD` does;
            not where a direction is made from halves of a batch.
        decay: of the running means of loss and measurements.
        max_decay: most that weight decay takes off in one step.
        ledger: a `conjopt.bounds.ConvergenceLedger` of the model and the criterion, to record both
            sides of Thm 3.1; one record costs about what its set costs to evaluate twice in
            float64, and waits for the device.
        ledger_every: steps from one record to the next, from the first on.
        history: a `conjopt.report.History`, or the path of one: `status` is recorded on measuring
            steps and on some of those given up, and on every ``measure_every``-th step of a rule
            that does not measure; by the first process. A copy of the optimizer has none.
        process_group: of `torch.distributed`, whose ranks the gradients at ``step`` are a mean
            over; None for that of DistributedDataParallel, or a single process.

    Raises:
        TypeError: if model or loss are missing or of another kind, or the criterion unknown.
        ValueError: if there are no parameters, some are not the model's or complex, or a
            hyperparameter is out of range.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model, criterion = nn.Linear(4, 3), nn.CrossEntropyLoss()
        >>> optimizer = ConjSGD(model.parameters(), model=model, loss=criterion)
        >>> x = torch.randn(30, 4)
        >>> y = x[:, :3].argmax(1)
        >>> for _ in range(5):
        ...     optimizer.zero_grad()
        ...     loss = criterion(model(x), y)
        ...     loss.backward()
        ...     optimizer.step()
        >>> bool(criterion(model(x), y) < loss), optimizer.status().step
        (True, 5)
    """

    def __init__(
        self,
        params: Any,
        *,
        model: nn.Module | None = None,
        loss: nn.Module | None = None,
        lr: float | Tensor = 1.0,
        momentum: float = 0.9,
        nesterov: bool = True,
        weight_decay: float | None = None,
        direction: str | Direction = "spectral",
        step_rule: str | StepRule = "edge",
        batch_rule: str | BatchRule | None = None,
        measure_every: int = 25,
        warmup: int = 20,
        data_floor: float | str = "auto",
        max_step: float | None = None,
        average: float = 0.0,
        maximize: bool = False,
        foreach: bool | None = None,
        dampening: float = 0.0,
        coupled_weight_decay: bool = False,
        decay: float = 0.9,
        max_decay: float = 0.002,
        ledger: ConvergenceLedger | None = None,
        ledger_every: int = 25,
        history: Any = None,
        process_group: Any = None,
    ) -> None:
        self._model, criterion, wrapper = checks.modules(model, loss)
        self._direction = checks.direction(direction)
        self._directions = {self._direction.name: self._direction}  # of all groups
        self._rule = checks.step_rule(step_rule, self._direction)
        self._batches = BatchAdvisor(rule_of(batch_rule))
        self._floor = DataFloor(checks.data_floor(data_floor))
        checks.number("average", average, 0, 1, open_end=True)
        checks.number("decay", decay, 0, 1, open_end=True)
        checks.number("max_decay", max_decay, 0, 1)
        checks.count("measure_every", measure_every, 1)
        checks.count("warmup", warmup, 1)
        checks.count("ledger_every", ledger_every, 1)
        self._memory = Memory()
        self._recording = Recording(checks.ledger(ledger), ledger_every, self._memory)
        self._every, self._warmup, self._average = measure_every, warmup, average
        self._foreach, self._max_decay = foreach, max_decay
        names = {id(p): name for name, p in self._model.named_parameters()}
        self._names = names
        parameters = checks.given_parameters(params)
        ranks = checks.ranks(process_group, self._model, self._rule)
        self._watch = Watch(self._model, criterion, dict(self._model.named_parameters()), ranks)
        if wrapper is not None:
            self._watch.wrapped_by(wrapper)
        self._watch.armed = self._rule.measures or ledger is not None
        if self._rule.measures:
            checks.shared(self._model, self._watch.ranks)
        potential = self._watch.potential_of.potential
        if weight_decay is None:
            runs_off = isinstance(potential, Softmax | Logistic)
            weight_decay = 0.1 if self._direction.name == "spectral" and runs_off else 0.0
        self._beta = potential.smoothness
        self._product = JacobianProduct(self._model)
        self._trust_only = False
        self._calls = 0
        self._warned: set[str] = set()
        defaults = {
            "lr": lr,
            "direction": self._direction.name,
            "momentum": momentum,
            "nesterov": nesterov,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "coupled_weight_decay": coupled_weight_decay,
            "max_step": max_step,
            "maximize": maximize,
        }
        checks.group(defaults, self._rule, self._direction)
        super().__init__(parameters, defaults)
        every = [p for group in self.param_groups for p in group["params"]]
        checks.some(every)
        wide = any(p.dtype == torch.float64 for p in every)
        dtype = torch.float64 if wide else torch.float32
        self._statistics = Statistics(decay, every[0].device, dtype)
        # Last, as it makes a file.
        self._journal = Journal(history, measure_every, warmup, process_group)
        for group in self.param_groups:
            none_yet = torch.zeros_like(self._statistics.steps)
            group["step_size"] = none_yet if self._rule.measures else group["lr"]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters of the model with their own hyperparameters, as in torch.

        Args:
            param_group: with "params" and what differs from the defaults.

        Raises:
            ValueError: if a parameter is not the model's, or a hyperparameter is out of range.

        Example:
            >>> model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
            >>> optimizer = ConjSGD(model[1].parameters(), model=model, loss=nn.MSELoss())
            >>> optimizer.add_param_group({"params": model[0].parameters(), "lr": 0.5})
            >>> [group["lr"] for group in optimizer.param_groups]
            [1.0, 0.5]
        """
        before = len(self.param_groups)
        own = self._direction
        if isinstance(param_group, dict):  # else torch says what it expects
            own = checks.direction(param_group.get("direction", own), self._directions)
            param_group["direction"] = own.name
        super().add_param_group(param_group)
        try:
            for group in self.param_groups[before:]:
                checks.group(group, self._rule, self._direction)
                checks.belong(group["params"], self._names, self._model)
                group.setdefault("step_size", 0.0)
            self._directions[own.name] = own
        except BaseException:
            del self.param_groups[before:]
            raise

    # Not to be compiled, as it runs the model again and asks for values; torch's own way of it,
    # which imports the compiler no earlier than torch does.
    @torch._disable_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step with the gradients at hand; without any, do nothing, as in torch.

        A loss, gradient, slope or curvature that is not finite gives up the step: parameters and
        state stay, it is counted in `status` and said once.

        Args:
            closure: computes the loss and its gradients anew, as in torch.

        Returns:
            what the closure returned.

        Raises:
            RuntimeError: if gradients are sparse, or do not come from an observed loss; it says
                what to do. Nothing was changed then.

        Example:
            >>> model, criterion = nn.Linear(2, 1), nn.MSELoss()
            >>> optimizer = ConjSGD(model.parameters(), model=model, loss=criterion)
            >>> criterion(model(torch.ones(4, 2)), torch.zeros(4, 1)).backward()
            >>> optimizer.step()
            >>> optimizer.status().step
            1
        """
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        if self._rule.measures:
            checks.outside_backward()
        fresh = not self.state
        blocks = Blocks.of(self.param_groups, self.state, self._names)
        if not blocks.parameters:
            checks.still_in(self._model, self._names)
            return result
        checks.dense(blocks.parameters)

        # Watch: loss and gradients in per-sample Fenchel-Young units.
        statistics = self._statistics
        recorded = self._recording.due(self._calls)
        if fresh and self._watch.empty and blocks.stand_still:
            self._prepare(blocks)
            return result
        observed = self._watch.batch() if self._rule.measures or recorded else None
        batch = observed if self._rule.measures else None
        seen = blocks.size(self._foreach).to(statistics.loss)
        joined = None
        if batch is not None:
            joined = self._watch.ranks.join(batch, self._floor.excess(batch, statistics), seen)
            checks.positive(joined.weight)
            seen = torch.where(joined.weight > 0, seen + joined.loss, torch.nan)
        blocks.scale(None if joined is None else joined.weight / unscaled_by(), self._foreach)
        finite = torch.isfinite(seen)
        if self._given_up(finite):
            self._record_skip(batch, joined)
            return result
        start = self._recording.begin(observed, self._watch.ranks) if recorded else None
        gate = self._gate(finite)
        blocks.gradients = [choose(gate, g, 0.0) for g in blocks.gradients]

        direction = self._of_groups(blocks)
        # Measure: the direction, and on measuring steps what it promises.
        found = self._measure(batch, joined, blocks, direction)
        if found is None:
            gradients = blocks.gradients
            u, pending = direction.propose(gradients, gradients, blocks.states, blocks.groups)
        else:
            u, pending = found.directions, found.pending
            finite = finite & found.finite
            if self._given_up(finite):
                self._record_skip(batch, joined)
                return result
            gate = self._gate(finite)

        # Decide.
        if joined is not None:
            statistics.see_loss(joined.loss, gate)
            told = blocks.along(u, self._rule.asks) if self._rule.asks else None
            self._rule.before_step(statistics, joined.loss, told, gate)
        if found is not None:
            if self._trust_only and not found.trust_only:
                statistics.restart(gate)
            self._trust_only = found.trust_only
            statistics.see(found.measurement, gate)
            self._rule.after_measuring(statistics, self._trust_only, gate)
            found.keep(blocks.states, gate)
            self._try(batch, blocks, found, gate)
        self._floor.give_up(statistics, gate)
        self._set_step_sizes(gate)

        # Step.
        direction.commit(blocks.gradients, blocks.states, blocks.groups, pending, gate)
        if self._rule.measures and self._direction.held_out:
            blocks.expect_slopes(statistics.steps)
        blocks.move(u, self._max_decay, gate)
        self._recording.end(start, self._calls)
        statistics.count(gate)
        if self._average:
            share = 1 / (self._average * statistics.steps + 1)
            share = torch.where(statistics.steps <= 1, 1.0, share)  # a prepared one starts here
            blocks.average(choose(gate, share, 0.0))
        if gate is None and self._floor.value is not None:
            self._say_what_happened()
        due = self._journal.due(self._calls)
        self._calls += 1
        self._batches.record(batch, joined, self._watch.ranks.size, measured=found is not None)
        self._watch.release()
        self._watch.armed = self._needs_watch()
        if due:
            lr = float(self.param_groups[0]["lr"])
            taken = gate is None or bool(gate)
            self._journal.write(
                self.status(), lr, batch, joined, self._floor, statistics, taken=taken
            )
        self._memory.say_once()
        if found is not None and found.other_terms > other_terms.MOST:
            self._say_what_rules_miss(found.other_terms)
        return result

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset gradients, as in torch, and forget what they came from.

        Args:
            set_to_none: as in torch.

        Example:
            >>> model, criterion = nn.Linear(2, 1), nn.MSELoss()
            >>> optimizer = ConjSGD(model.parameters(), model=model, loss=criterion)
            >>> criterion(model(torch.ones(4, 2)), torch.zeros(4, 1)).backward()
            >>> optimizer.zero_grad()
            >>> model.weight.grad is None
            True
        """
        super().zero_grad(set_to_none)
        self._watch.clear()

    def observe(self, outputs: Tensor, targets: Tensor, scale: float = 1.0) -> None:
        """Say what the loss is made of, where the criterion module itself is not called.

        Call it between the model's forward and ``backward()``. The same outputs and targets count
        once: as in the last call, or as the criterion itself was called on them.

        Args:
            outputs: what the criterion would be given, computed from the model's output.
            targets: as the criterion takes them.
            scale: the factor of the criterion's value in what is differentiated.

        Raises:
            RuntimeError: if the outputs do not come from a training forward since the last step.

        Example:
            >>> model = nn.Linear(2, 1)
            >>> optimizer = ConjSGD(model.parameters(), model=model, loss=nn.MSELoss())
            >>> outputs, targets = model(torch.ones(4, 2)), torch.zeros(4, 1)
            >>> optimizer.observe(outputs, targets)
            >>> nn.functional.mse_loss(outputs, targets).backward()
            >>> optimizer.step()
        """
        self._watch.observe(outputs, targets, scale)

    @property
    def measures_next(self) -> bool:
        """Whether the next step measures or records, so that no captured step can stand for it.

        Example:
            >>> model = nn.Linear(2, 1)
            >>> ConjSGD(model.parameters(), model=model, loss=nn.MSELoss()).measures_next
            True
        """
        return self._needs_watch() or self._journal.due(self._calls)

    def replayed(self) -> None:
        """Count an ordinary step that a CUDA graph took, in which `step` was captured.

        See docs/how_it_works.md.

        Example:
            >>> model = nn.Linear(2, 1)
            >>> optimizer = ConjSGD(model.parameters(), model=model, loss=nn.MSELoss())
            >>> optimizer.replayed()
        """
        self._calls += 1
        self._watch.armed = self._needs_watch()

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Put the tail average of the parameters in their place inside the block, to evaluate with.

        It is the running mean with weight ``1 / (average t + 1)`` for the parameters after step t:
        about the last ``average`` of the run, whatever its length.

        Raises:
            RuntimeError: if the optimizer was made with ``average=0``.

        Example:
            >>> model, criterion = nn.Linear(2, 1), nn.MSELoss()
            >>> optimizer = ConjSGD(model.parameters(), model=model, loss=criterion, average=0.1)
            >>> for _ in range(2):
            ...     optimizer.zero_grad()
            ...     criterion(model(torch.ones(4, 2)), torch.zeros(4, 1)).backward()
            ...     optimizer.step()
            >>> before = model.weight.detach().clone()
            >>> with optimizer.averaged():
            ...     inside = model.weight.detach().clone()
            >>> torch.equal(before, inside), torch.equal(before, model.weight)
            (False, True)
        """
        if not self._average:
            raise RuntimeError(
                "averaged(): this optimizer keeps no average; make it with average=0.1, say"
            )
        held = [
            (p, self.state[p]["average"], p.detach().clone())
            for group in self.param_groups
            for p in group["params"]
            if "average" in self.state[p]
        ]
        reshard(self._model)
        with torch.no_grad():
            for parameter, average, _ in held:
                parameter.copy_(average)
        try:
            yield
        finally:
            reshard(self._model)
            with torch.no_grad():
                for parameter, _, own in held:
                    parameter.copy_(own)

    def status(self) -> Status:
        """Where the optimizer stands; reads from the device, so not for every step.

        Returns:
            a snapshot whose printed form is a table.

        Example:
            >>> model, criterion = nn.Linear(2, 1), nn.MSELoss()
            >>> optimizer = ConjSGD(model.parameters(), model=model, loss=criterion)
            >>> optimizer.status().limited_by
            'nothing measured'
        """
        self._say_what_happened()
        statistics, group = self._statistics, self.param_groups[0]
        held_out, ledger = self._direction.held_out, self._recording.ledger
        return Status.of(
            statistics,
            self._rule.limits(statistics, self._beta, self._trust_only),
            group,
            measures=self._rule.measures,
            trust_only=self._trust_only,
            held_out=held_out,
            conditions=conditions(ledger, statistics, float(group["step_size"]), held_out),
            batch_sizes=(self._batches.batch_size, self.recommended_batch_size()),
            extremes=self._recording.extremes,
        )

    def recommended_batch_size(self, population: int | None = None) -> int | None:
        """The batch size that ``batch_rule`` asks for now (Thm 3.3); reads from the device.

        Args:
            population: n, samples in the training set; None for many more than a batch.

        Returns:
            the size; None without a rule, or where nothing was measured yet.

        Example:
            >>> model, criterion = nn.Linear(2, 1), nn.MSELoss()
            >>> optimizer = ConjSGD(
            ...     model.parameters(), model=model, loss=criterion, batch_rule="correlation"
            ... )
            >>> optimizer.recommended_batch_size() is None
            True
        """
        return self.batch_advice(population).batch_size

    def batch_advice(
        self, population: int | None = None, *, least: int = 1, most: int | None = None
    ) -> Recommendation:
        """What ``batch_rule`` asks for now, with its reason; reads from the device.

        Args:
            population: n, samples in the training set; None for many more than a batch.
            least: the smallest size that can be used.
            most: the largest; None for any.

        Example:
            >>> model = nn.Linear(2, 1)
            >>> optimizer = ConjSGD(
            ...     model.parameters(), model=model, loss=nn.MSELoss(), batch_rule="work"
            ... )
            >>> optimizer.batch_advice().reason
            'no gradient noise was measured yet'
        """
        return self._batches.advise(self._statistics, population, least=least, most=most)

    # The parts of a step.

    def _prepare(self, blocks: Blocks) -> None:
        """Make the state of a first step, of which nothing is known yet.

        `torch.distributed.checkpoint` makes what it loads into by a step at rate 0 along zeros.
        """
        gradients = blocks.gradients
        direction = self._of_groups(blocks)
        _, pending = direction.propose(gradients, gradients, blocks.states, blocks.groups)
        direction.commit(gradients, blocks.states, blocks.groups, pending, None)
        for state in blocks.states:
            for value in state.values():
                value.zero_()
        if self._rule.measures and self._direction.held_out:
            blocks.expect_slopes(self._statistics.steps)
        if self._average:
            blocks.average(torch.ones_like(self._statistics.steps))

    def _measure(
        self, batch: Batch | None, joined: Joined | None, blocks: Blocks, direction: Direction
    ) -> measuring.Found | None:
        """What a measuring step finds, None on an ordinary one."""
        if batch is None or joined is None or not self._due():
            return None
        if any(forward.replay is None for forward in batch.forwards):
            return None
        checks.shared(self._model, self._watch.ranks)
        found = self._memory.alone(
            self._watch.ranks,
            measuring.measure,
            self._watch,
            batch,
            joined,
            blocks,
            direction,
            self._product,
            self._statistics,
            self._trust_only,
            self._rule.products,
            self._rule.sampled,
            self._memory,
        )
        return None if found is not None and found.nothing else found

    def _try(self, batch: Batch | None, blocks: Blocks, found: measuring.Found, gate: Gate) -> None:
        """Try the step on the measured samples, as the limits trust the linearised model."""
        statistics = self._statistics
        radius = self._rule.radius(statistics, self._beta, self._trust_only)
        if radius is None or found.trial is None or batch is None:
            return
        # a times the greatest lr, of which each block's ratio is part of the direction; no more
        # than max_step lets any group take.
        most = max(float(group["lr"]) for group in blocks.groups)
        tried = statistics.share * self._rule.least(statistics, self._beta, self._trust_only)
        tried = torch.where(torch.isfinite(tried), tried, 0.0)
        caps = [group["max_step"] for group in blocks.groups]
        if most > 0 and all(cap is not None for cap in caps):
            tried = tried.clamp(max=max(caps) / most)
        change = found.trial.change(batch, blocks, tried * most, self._memory).to(radius)
        known = ~(change < 0)
        gate = known if gate is None else gate & known
        self._rule.after_trying(statistics, tried, change, radius, gate)

    def _set_step_sizes(self, gate: Gate) -> None:
        """``a lr`` of each group: a tensor, or the number that ``lr`` is under a constant rule."""
        least = None
        if self._rule.measures:
            least = self._rule.step_size(self._statistics, self._beta, self._trust_only)
        for group in self.param_groups:
            size = group["lr"] if least is None else least * group["lr"]
            if (cap := group["max_step"]) is not None:
                size = size.clamp(max=cap) if isinstance(size, Tensor) else min(size, cap)
            if least is not None:
                size, held = choose(gate, size, 0.0), group.get("step_size")
                if gate is not None and isinstance(held, Tensor) and held.shape == size.shape:
                    size = held.copy_(size)  # as `gate.write` does
            group["step_size"] = size

    # What the step needs to know.

    def _of_groups(self, blocks: Blocks) -> Direction:
        """The direction, or those that the groups name."""
        if all(group["direction"] == self._direction.name for group in blocks.groups):
            return self._direction
        return ByGroup(self._directions)

    def _due(self) -> bool:
        """Whether the next step measures."""
        number = self._calls + 1
        due = number <= self._warmup or number % self._every == 0 or not self._statistics.measured
        return self._rule.measures and due

    def _needs_watch(self) -> bool:
        """Whether the next step needs more of the loop than its losses."""
        return self._due() or self._recording.due(self._calls)

    def _given_up(self, finite: Tensor) -> bool:
        """On a CPU, whether the step is to be given up; a device is not asked."""
        if finite.device.type != "cpu" or bool(finite):
            return False
        self._statistics.skipped = self._statistics.skipped + 1
        self._watch.release()
        self._say_what_happened()
        return True

    def _record_skip(self, batch: Batch | None, joined: Joined | None) -> None:
        if self._journal.history is not None:
            lr = float(self.param_groups[0]["lr"])
            self._journal.gave_up(self.status(), lr, batch, joined, self._floor, self._statistics)

    def _gate(self, finite: Tensor) -> Gate:
        """What makes the step conditional on a device; a CPU has been asked already."""
        return None if finite.device.type == "cpu" else finite

    def _say_what_happened(self) -> None:
        """Warn once of skipped steps and of a floor that was given up; waits for a device."""
        statistics = self._statistics
        if "skipped" not in self._warned and bool(statistics.skipped > 0):
            self._warned.add("skipped")
            warnings.warn(
                "ConjSGD gave up a step: a loss, gradient or measurement was not finite. "
                "Parameters and state stayed as they were; status().skipped_steps counts such "
                "steps. If they go on, look for infinities in inputs, targets and loss, and for "
                "batches in which no sample counts.",
                RuntimeWarning,
                stacklevel=levels_to_the_user(),
            )
        if "floor" not in self._warned and bool(statistics.lowered > 0):
            self._warned.add("floor")
            warnings.warn(
                f"ConjSGD: losses stay below data_floor={self._floor.value}, so it is no floor of "
                "the training loss; going on without it. Give the floor in the criterion's units, "
                'or leave data_floor="auto".',
                RuntimeWarning,
                stacklevel=levels_to_the_user(),
            )

    def _say_what_rules_miss(self, share: float) -> None:
        if "other terms" not in self._warned:
            self._warned.add("other terms")
            other_terms.warn(share, self._rule.name)
