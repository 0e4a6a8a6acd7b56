"""A cache survives files and checkpoints exactly, and refuses files and states that are not its own."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rpo_lightning.cache.cache import CachedResponse, CacheEntry, ExperienceCache
from rpo_lightning.cache.parquet import read_cache, write_cache
from rpo_lightning.cache.spans import cut_spans, extend_spans
from rpo_lightning.core.errors import CacheError
from tests.conftest import cache_contents


def filled_cache() -> ExperienceCache:
    cache = ExperienceCache("abc")
    response = CachedResponse(np.array([5, 6, 2**31 - 1], np.int32), 0.75, True, False, ((0, 1), (4, 2)))
    cache.remember("with response", response)
    full = cache.entry("with response")
    full.visits, full.restart, full.state = 3, True, {"shortest_length": 2, "anchors": [[1, 2], [3]]}
    cache.entry("without response").visits = 1
    return cache


def test_a_file_holds_everything(tmp_path):
    write_cache(filled_cache(), tmp_path / "cache.parquet")
    loaded = ExperienceCache("abc")
    loaded = read_cache(tmp_path / "cache.parquet", loaded.tokenizer_fingerprint)
    assert cache_contents(loaded) == cache_contents(filled_cache())
    assert [p.name for p in tmp_path.iterdir()] == ["cache.parquet"]


def test_a_checkpoint_holds_everything_and_is_read_without_pickle(tmp_path):
    torch.save(filled_cache().state_dict(), tmp_path / "state.ckpt")
    loaded = ExperienceCache("abc")
    loaded.load_state_dict(torch.load(tmp_path / "state.ckpt", weights_only=True))
    assert cache_contents(loaded) == cache_contents(filled_cache())


def test_an_empty_cache_survives_too(tmp_path):
    write_cache(ExperienceCache("abc"), tmp_path / "cache.parquet")
    cache = filled_cache()
    cache = read_cache(tmp_path / "cache.parquet", cache.tokenizer_fingerprint)
    assert len(cache) == 0


def test_another_tokenizers_cache_is_refused(tmp_path):
    write_cache(filled_cache(), tmp_path / "cache.parquet")
    with pytest.raises(CacheError, match=r"cache\.parquet: made with another tokenizer"):
        read_cache(tmp_path / "cache.parquet", "xyz")
    with pytest.raises(CacheError, match="another tokenizer"):
        ExperienceCache("xyz").load_state_dict(filled_cache().state_dict())


def test_files_that_are_no_caches_are_refused(tmp_path):
    with pytest.raises(CacheError, match="no such cache file"):
        read_cache(tmp_path / "missing.parquet", "abc")
    (tmp_path / "text.parquet").write_text("hello")
    with pytest.raises(CacheError, match=r"text\.parquet: not a readable Parquet file"):
        read_cache(tmp_path / "text.parquet", "abc")


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    import pyarrow.parquet

    path = tmp_path / "cache.parquet"
    write_cache(filled_cache(), path)

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(pyarrow.parquet.ParquetWriter, "write_batch", fail)
    with pytest.raises(OSError, match="disk full"):
        write_cache(filled_cache(), path)
    cache = ExperienceCache("abc")
    cache = read_cache(path, cache.tokenizer_fingerprint)
    assert len(cache) == 2


def test_spans_are_cut_and_extended():
    spans = ((0, 3), (2, 4))
    assert cut_spans(spans, 5) == ((0, 3), (2, 2))
    assert cut_spans(spans, 0) == ()
    assert extend_spans(((0, 3),), 2, step=0) == ((0, 5),)
    assert extend_spans(((0, 3),), 2, step=7) == ((0, 3), (7, 2))
    assert extend_spans(((0, 3),), 0, step=7) == ((0, 3),)


def test_statistics_of_an_entry_without_response_do_not_count():
    cache = ExperienceCache("abc")
    cache.entry("a")
    assert isinstance(cache.get("a"), CacheEntry)
    assert cache.statistics(step=1) == {"entries": 1.0, "responses": 0.0}


def random_response(rng: np.random.Generator, step: int) -> CachedResponse:
    lengths = rng.integers(0, 400, 3).tolist()
    spans = tuple((s, n) for s, n in zip(sorted(rng.integers(-1, step + 1, 3).tolist()), lengths, strict=True) if n)
    ids = rng.integers(0, 2**31 - 1, sum(lengths), dtype=np.int32)
    return CachedResponse(ids, float(rng.random()), bool(rng.random() < 0.5), bool(rng.random() < 0.5), spans)


def visited_cache(visits: int = 3000) -> ExperienceCache:
    """A cache after many visits of 300 questions, some of which never get a response."""
    rng = np.random.default_rng(0)
    cache = ExperienceCache("abc")
    for visit in range(visits):
        uid = f"question {rng.integers(0, 300)} ü"
        entry = cache.entry(uid)
        if not uid.startswith("question 1"):
            cache.remember(uid, random_response(rng, visit))
        entry.visits += 1
        entry.restart = bool(visit % 2)
        entry.state["seen"] = visit
    return cache


def test_statistics_are_those_of_a_pass_over_all_responses():
    cache = visited_cache()
    responses = [e.response for e in cache if e.response is not None]
    assert 0 < len(responses) < len(cache)
    tokens = sum(len(r) for r in responses)
    assert cache.statistics(3000) == pytest.approx(
        {
            "entries": len(cache),
            "responses": len(responses),
            "correct_share": sum(r.correct for r in responses) / len(responses),
            "length": tokens / len(responses),
            "age": sum(3000 - max(r.spans[-1][0], 0) for r in responses) / len(responses),
            "initial_token_share": sum(n for r in responses for step, n in r.spans if step <= 0) / tokens,
        }
    )
    loaded = ExperienceCache("abc")
    loaded.load_state_dict(cache.state_dict())
    assert loaded.statistics(3000) == cache.statistics(3000)


def test_many_entries_survive_files_and_checkpoints_exactly(tmp_path):
    cache = visited_cache()
    write_cache(cache, tmp_path / "cache.parquet")
    torch.save(cache.state_dict(), tmp_path / "state.ckpt")
    of_file, of_state = ExperienceCache("abc"), ExperienceCache("abc")
    of_file = read_cache(tmp_path / "cache.parquet", of_file.tokenizer_fingerprint)
    of_state.load_state_dict(torch.load(tmp_path / "state.ckpt", weights_only=True))
    assert cache_contents(of_file) == cache_contents(of_state) == cache_contents(cache)


def test_a_file_of_many_batches_holds_everything(tmp_path, monkeypatch):
    from rpo_lightning.cache import parquet as cache_file

    monkeypatch.setattr(cache_file, "BATCH_ROWS", 7)
    cache = visited_cache(500)
    write_cache(cache, tmp_path / "cache.parquet")
    monkeypatch.setattr(cache_file, "BATCH_ROWS", 11)
    loaded = ExperienceCache("abc")
    loaded = read_cache(tmp_path / "cache.parquet", loaded.tokenizer_fingerprint)
    assert cache_contents(loaded) == cache_contents(cache)


def test_a_state_is_not_changed_by_what_happens_to_the_cache_later(tmp_path):
    cache = visited_cache()
    before, state = cache_contents(cache), cache.state_dict()
    rng = np.random.default_rng(1)
    for entry in list(cache):
        for _ in range(20):
            cache.remember(entry.uid, random_response(rng, 9))
        entry.visits, entry.restart, entry.state = 0, False, {}
    cache.entry("another question").visits = 1
    cache.forget_updates()
    restored = ExperienceCache("abc")
    restored.load_state_dict(state)
    assert cache_contents(restored) == before
    assert cache_contents(cache) != before


def test_a_response_changes_only_through_the_cache():
    cache = filled_cache()
    entry = cache.entry("with response")
    with pytest.raises(AttributeError):
        entry.response = None
    with pytest.raises(ValueError, match="read-only"):
        entry.response.token_ids[0] = 1


def test_forgotten_updates_mark_all_tokens_as_imported():
    cache = filled_cache()
    cache.forget_updates()
    assert cache.entry("with response").response.spans == ((-1, 3),)
    assert cache.statistics(step=5) == {
        "entries": 2.0, "responses": 1.0, "correct_share": 1.0, "length": 3.0, "age": 5.0, "initial_token_share": 1.0
    }  # fmt: skip


def test_a_damaged_file_is_refused_and_leaves_the_cache_as_it_was(tmp_path):
    path = tmp_path / "cache.parquet"
    write_cache(visited_cache(), path)
    data = bytearray(path.read_bytes())
    data[len(data) // 3 : len(data) // 2] = bytes(len(data) // 2 - len(data) // 3)
    path.write_bytes(data)
    cache = filled_cache()
    with pytest.raises(CacheError, match=r"cache\.parquet: not a readable Parquet file"):
        cache = read_cache(path, cache.tokenizer_fingerprint)
    assert cache_contents(cache) == cache_contents(filled_cache())


def test_a_file_of_other_columns_or_with_empty_values_is_refused(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "cache.parquet"
    write_cache(filled_cache(), path)
    table = pq.read_table(path)
    pq.write_table(table.drop_columns(["reward"]), path)
    with pytest.raises(
        CacheError, match="columns are not an experience cache's, which are uid, slot, token_ids, reward"
    ):
        read_cache(path, "abc")
    rewards = pa.array([0.5, None])
    pq.write_table(table.set_column(3, "reward", rewards), path)
    with pytest.raises(CacheError, match="1 empty values in its column 'reward'"):
        read_cache(path, "abc")
    pq.write_table(table.replace_schema_metadata({}), path)
    with pytest.raises(CacheError, match="no tokenizer fingerprint"):
        read_cache(path, "abc")


def test_another_releases_cache_is_refused():
    state = {**filled_cache().state_dict(), "version": 1}
    with pytest.raises(CacheError, match="cache format 1, this release reads formats 2 and 3"):
        ExperienceCache("abc").load_state_dict(state)
