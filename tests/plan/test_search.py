"""The search: which candidates there are, which are dropped uncompiled, and that nothing is compiled twice.

Compiling is replaced by a table of memory and time; the bounds need libtpu for the devices alone.
"""

from pathlib import Path

import pytest
import tiny
from fake_compiler import FakeCompiler

from vlm_jax.plan import search
from vlm_jax.plan.cache import PlanCache
from vlm_jax.plan.topologies import Topology

SMALL = Topology("v5e", "2x2")


def run(monkeypatch: pytest.MonkeyPatch, cache: Path, fitting: str, compiles: int) -> tuple[search.Found, FakeCompiler]:
    compiler = FakeCompiler(fitting)
    monkeypatch.setattr(search, "make_plan", compiler.make_plan)
    monkeypatch.setattr(search, "plan_json", compiler.plan_json)
    # the real bounds trace every policy; they have a test of their own
    monkeypatch.setattr(search._Bounds, "_state", lambda self, candidate: 1)
    monkeypatch.setattr(search._Bounds, "_kept", lambda self, each: 4 - search.REMAT_ORDER.index(each.remat))
    monkeypatch.setattr(search._Bounds, "cost", lambda self, c: (search.REMAT_ORDER.index(c.remat), c.accum_steps))
    return search.search(tiny.config(), SMALL, PlanCache(cache), compiles), compiler


def test_candidates_divide_the_batch_and_change_only_what_differs() -> None:
    found = list(search.candidates(tiny.config(), SMALL))
    # meshes 1 x 4, 4 x 1, 1 x 2 x 2 (chips that share a batch of 16: 4, 4, 2), 4 policies, 2 dtypes; microbatches
    # 1, 2, 4, and for two chips 8 as well
    assert len(found) == (3 + 3 + 4) * 4 * 2
    assert len(set(found)) == len(found)
    unchanged = [each for each in found if not each.overrides(tiny.config(mesh__data=4))]
    assert len(unchanged) == 1
    assert unchanged[0].remat == "none"


def test_the_best_plan_comes_first_and_what_needs_more_is_not_compiled(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found, compiler = run(monkeypatch, tmp_path / "cache.jsonl", "save_qkv_mid", 1000)
    changes, best = found.plans[0]
    assert best["fits"]
    assert changes["objective.model.image.remat"] == "save_qkv_mid"
    assert changes["objective.model.text.remat"] == "save_qkv_mid"
    assert "train.accum_steps" not in changes
    assert found.left == 0
    # one plan each of the two policies that keep too much, and all of the others
    assert (found.tried, found.pruned, len(found.plans)) == (80, 2 * 19, 80 - 2 * 19)
    assert len(compiler.compiled) == len(found.plans)
    assert [plan["fits"] for _, plan in found.plans] == sorted((p["fits"] for _, p in found.plans), reverse=True)
    text = search.render(found)
    assert text.index("--config.objective.model.image.remat=save_qkv_mid") < text.index("does not fit")
    assert search.to_json(found)["best"] == changes


def test_a_search_goes_on_from_its_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cache = tmp_path / "deep" / "cache.jsonl"
    first, compiler = run(monkeypatch, cache, "full", 5)
    assert (len(compiler.compiled), len(first.plans)) == (5, 5)
    assert first.left > 0
    with cache.open("a") as file:
        file.write('{"key": "half a li')
    second, again = run(monkeypatch, cache, "full", 5)
    assert (len(again.compiled), len(second.plans)) == (5, 10)
    third, none = run(monkeypatch, cache, "full", 0)
    assert none.compiled == []
    assert third.plans == second.plans


def test_an_entry_of_other_sources_is_not_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cache, config = PlanCache(tmp_path / "c"), tiny.config()
    cache.put(config, SMALL, {"x": 1})
    assert PlanCache(tmp_path / "c").get(config, SMALL) == {"x": 1}
    assert cache.get(tiny.config(seed=1), SMALL) is None
    assert cache.get(config, Topology("v5e", "2x2", 2)) is None
    monkeypatch.setattr("vlm_jax.plan.cache._sources_digest", lambda: "other")
    assert PlanCache(tmp_path / "c").get(config, SMALL) is None


@pytest.mark.xdist_group("libtpu")
def test_bounds_grow_with_what_is_kept_and_replicated() -> None:
    config = tiny.config(objective__model__image__remat="full", objective__model__text__remat="full")
    bounds = search._Bounds(config, SMALL)
    found = {
        (c.mesh[1][1], c.mesh[2][1], c.remat, c.accum_steps, c.moments): c for c in search.candidates(config, SMALL)
    }
    full, none, split, micro, half = (
        bounds.bytes(found[key])
        for key in (
            ("1", "1", "full", 1, "float32"),
            ("1", "1", "none", 1, "float32"),
            ("4", "1", "full", 1, "float32"),
            ("1", "1", "full", 2, "float32"),
            ("1", "1", "full", 1, "bfloat16"),
        )
    )
    assert none > full
    assert split < full
    assert micro < full
    # the first moment of every parameter in 2 bytes instead of 4
    assert full - half == 2 * bounds._weights(found["1", "1", "full", 1, "float32"])[0]
