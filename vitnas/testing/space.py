"""SpaceContract: what every Space promises. Subclass it and give a fixture `space`."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import ClassVar

import numpy as np

from vitnas.arch import Arch
from vitnas.counting import count
from vitnas.errors import UserError
from vitnas.space import Genes, Matrix, Space, space_from_json
from vitnas.testing.refusal import refusal

BRUTE_FORCE = 20_000  # Spaces with at most so many gene combinations are counted one by one


class SpaceContract:
    """Tests of one Space; `quantities` are costs that rise with the options of every gene."""

    quantities: ClassVar[tuple[str, ...]] = ("macs", "params", "memory_bytes")

    def test_genes_and_archs_match_one_to_one(self, space: Space) -> None:
        rng = random.Random(0)
        found: dict[Arch, Genes] = {}
        for _ in range(50):
            genes = space.random_genes(rng)
            arch = space.decode(genes)
            assert space.encode(arch) == genes
            assert space.canonical(genes) == genes
            assert arch in space
            assert found.setdefault(arch, genes) == genes
        assert len(set(found.values())) == len(found)

    def test_genes_that_do_not_matter_do_not_matter(self, space: Space) -> None:
        rng = random.Random(1)
        for _ in range(50):
            loose = [rng.randrange(n) for n in space.num_options]
            canonical = space.canonical(loose)
            assert space.decode(loose) == space.decode(canonical)
            assert space.encode(space.decode(loose)) == canonical

    def test_what_matters_follows_from_earlier_genes(self, space: Space) -> None:
        """A policy decides gene after gene; whether one matters must be known when its turn comes."""
        genes = space.random_matrix(50, np.random.default_rng(3))
        whole = space.active_matrix(genes)
        for place in range(genes.shape[1]):
            begun = genes.copy()
            begun[:, place:] = 0
            assert (space.active_matrix(begun)[:, place] == whole[:, place]).all(), space.genes[place].name

    def test_size_counts_different_archs(self, space: Space) -> None:
        if math.prod(space.num_options) <= BRUTE_FORCE:
            every = itertools.product(*(range(n) for n in space.num_options))
            assert space.size() == len({space.decode(genes) for genes in every})
        else:
            rng = random.Random(2)
            assert space.size() > len({space.random_genes(rng) for _ in range(200)}) > 1

    def test_extremes_and_corners(self, space: Space) -> None:
        corners = space.corners()
        assert {space.largest(), space.smallest()} <= set(corners)
        assert len(set(corners)) == len(corners)
        # a finer patch has more MACs but a smaller kernel, hence fewer parameters
        same_patch = len({a.patch_size for a in corners}) == 1
        quantities = self.quantities if same_patch else ("macs",)
        for arch in [*corners, space.middle()]:
            assert arch in space
            for cost in quantities:
                value = getattr(count(arch), cost)
                assert (
                    getattr(count(space.smallest()), cost) <= value <= getattr(count(space.largest()), cost)
                )

    def test_random_matrix_is_canonical_and_follows_the_weights(self, space: Space) -> None:
        n = 4000
        matrix = space.random_matrix(n, np.random.default_rng(0))
        assert matrix.shape == (n, len(space.genes))
        np.testing.assert_array_equal(space.canonical_matrix(matrix), matrix)
        self._follow_the_weights(space, matrix)

    def test_random_genes_follow_the_weights(self, space: Space) -> None:
        rng = random.Random(9)
        self._follow_the_weights(space, np.asarray([space.random_genes(rng) for _ in range(400)]))

    @staticmethod
    def _follow_the_weights(space: Space, matrix: Matrix) -> None:
        """Where a gene matters, its options are as likely as its weights say; or, where other genes settle it, as in
        other draws by the weights."""
        rng, n = np.random.default_rng(1), 20_000
        loose = np.stack([rng.choice(len(gene.options), n, p=gene.weights) for gene in space.genes], axis=1)
        others = space.canonical_matrix(loose)
        active, others_active = space.active_matrix(matrix), space.active_matrix(others)
        for index, gene in enumerate(space.genes):
            options, on = len(gene.options), others_active[:, index]
            values, drawn, settled = matrix[active[:, index], index], loose[on, index], others[on, index]
            if (settled == drawn).all():
                chances = np.asarray(gene.weights or [1 / options] * options)
            else:
                chances = np.bincount(settled, minlength=options) / len(settled)
            share = np.bincount(values, minlength=options) / max(1, len(values))
            # six deviations of a share of so many draws
            deviation = (chances.max() * (1 / max(1, len(values)) + 1 / max(1, len(settled)))) ** 0.5
            np.testing.assert_allclose(share, chances, atol=6 * deviation, err_msg=gene.name)

    def test_random_genes_follow_the_generator(self, space: Space) -> None:
        drawn = [[space.random_genes(rng) for _ in range(5)] for rng in (random.Random(3), random.Random(3))]
        assert drawn[0] == drawn[1]
        assert space.sample(random.Random(3)) == space.decode(drawn[0][0])

    def test_mutation(self, space: Space) -> None:
        rng = random.Random(4)
        changed = 0
        for _ in range(50):
            genes = space.random_genes(rng)
            assert space.mutate_genes(genes, rng, prob=0, structural_prob=0) == genes
            child = space.mutate_genes(genes, rng, prob=0.5, structural_prob=0)
            assert space.encode(space.decode(child)) == child
            for gene, before, after in zip(space.genes, genes, child, strict=True):
                assert before == after or not gene.structural
            changed += child != genes
        assert changed > 10

    def test_mutation_reaches_every_option(self, space: Space) -> None:
        rng = random.Random(5)
        seen = {(i, v) for _ in range(400) for i, v in enumerate(self._wild(space, rng))}
        assert seen == {(i, v) for i, n in enumerate(space.num_options) for v in range(n)}

    def test_genes_that_a_mutation_brings_to_life_are_drawn(self, space: Space) -> None:
        rng, start = random.Random(8), space.encode(space.smallest())
        asleep = [
            i for i, alive in enumerate(space.active_matrix(np.asarray([start]))[0].tolist()) if not alive
        ]
        children = np.asarray([space.mutate_genes(start, rng, prob=0, structural_prob=1) for _ in range(400)])
        alive = space.active_matrix(children)
        for index in asleep:
            awake = children[alive[:, index]]
            assert set(awake[:, index].tolist()) == self._settled(
                space, awake, index, range(space.num_options[index])
            )
        assert not asleep or alive[:, asleep].any()

    @staticmethod
    def _settled(space: Space, genes: Matrix, index: int, options: Sequence[int]) -> set[int]:
        """What a gene can be in these canonical genes, if one of `options` is drawn for it."""
        drawn = np.repeat(genes, len(options), axis=0)
        drawn[:, index] = np.tile(options, len(genes))
        return set(space.canonical_matrix(drawn)[:, index].tolist())

    @staticmethod
    def _wild(space: Space, rng: random.Random) -> tuple[int, ...]:
        return space.mutate_genes(space.encode(space.largest()), rng, prob=1, structural_prob=0.5)

    def test_crossover_takes_genes_from_the_parents(self, space: Space) -> None:
        rng = random.Random(6)
        mixed = 0
        for _ in range(50):
            first, second = space.random_genes(rng), space.random_genes(rng)
            assert space.cross_genes(first, first, rng) == first
            child = space.cross_genes(first, second, rng)
            assert space.encode(space.decode(child)) == child
            alive = space.active_matrix(np.asarray([child, first, second])).tolist()
            for index, value in enumerate(child):
                if alive[0][index]:
                    taken = [p[index] for p, a in ((first, alive[1]), (second, alive[2])) if a[index]]
                    taken = taken or [first[index], second[index]]
                    assert value in self._settled(space, np.asarray([child]), index, taken)
            mixed += child not in (first, second)
        assert mixed > 10

    def test_an_arch_of_another_shape_is_refused_with_every_reason(self, space: Space) -> None:
        arch = space.middle()
        (_, height, width), step = arch.input_size, arch.patch_size << (len(arch.stages) - 1)
        other = replace(
            arch,
            image_size=(height + step, width + step),
            num_classes=arch.num_classes + 1,
            stages=(*arch.stages[:-1], replace(arch.stages[-1], embed_dim=7919)),
        )
        reasons = space.reasons_against(other)
        assert len(reasons) >= 3
        for call in (space.encode, space.check):
            message = refusal(lambda call=call: call(other))  # type: ignore[misc]
            assert all(reason in message for reason in reasons)
            assert space.name in message
            assert other.id in message
        for word in ("image_size", "num_classes", "embed_dim"):
            assert any(word in reason for reason in reasons)

    def test_an_arch_with_other_parts_is_refused(self, space: Space) -> None:
        """What the Space never decodes to, it does not contain: its supernet would lack the weights."""
        arch = space.smallest()
        others = {"distill_token": True, "patch_head": True, "mlp_norm": "stream", "attn_scale": "embed_dim"}
        for name, value in {**others, "head_norm_eps": 1e-3, "qkv_bias": False}.items():
            with suppress(UserError):  # there may be no such Arch at all
                other = replace(arch, **{name: value})  # type: ignore[arg-type]
                found = any(f"{name} is {value!r}" in reason for reason in space.reasons_against(other))
                assert found or other == arch, name

    def test_genes_of_another_length_or_range_are_refused(self, space: Space) -> None:
        genes = list(space.encode(space.smallest()))
        assert f"there are {len(genes) - 1} genes" in refusal(lambda: space.decode(genes[:-1]))
        genes[-1] = space.num_options[-1]
        assert f"gene {len(genes) - 1} ({space.genes[-1].name})" in refusal(lambda: space.decode(genes))
        genes[-1] = -1
        assert "counts from 0" in refusal(lambda: space.decode(genes))

    def test_cost_table_is_the_count(self, space: Space) -> None:
        corners = [space.encode(arch) for arch in space.corners()]
        matrix = np.concatenate([np.asarray(corners), space.random_matrix(40, np.random.default_rng(7))])
        costs = space.cost_table().costs(matrix)
        for row, genes in enumerate(matrix.tolist()):
            cost = count(space.decode(genes))
            got = tuple(int(costs[key][row]) for key in ("macs", "params", "memory"))
            assert got == (cost.macs, cost.params, cost.memory_bytes)

    def test_the_span_of_costs_is_that_of_all_archs(self, space: Space) -> None:
        if is_all := math.prod(space.num_options) <= BRUTE_FORCE:
            drawn = np.array(list(itertools.product(*(range(n) for n in space.num_options))))
        else:
            drawn = space.random_matrix(1000, np.random.default_rng(8))
        for quantity, values in space.cost_table().costs(space.canonical_matrix(drawn)).items():
            low, high = space.cost_span(quantity)
            assert low <= values.min() <= values.max() <= high
            assert not is_all or (low, high) == (values.min(), values.max())

    def test_json_round_trip(self, space: Space) -> None:
        again = space_from_json(json.loads(json.dumps(space.to_json())))
        assert again == space
        assert again.genes == space.genes
        assert again.largest() == space.largest()

    def test_slots_point_into_the_largest(self, space: Space) -> None:
        for arch in space.corners():
            slots = space.slots(arch)
            assert len(slots) == arch.depth
            assert slots == sorted(set(slots))
            assert 0 <= slots[0] <= slots[-1] < space.largest().depth
