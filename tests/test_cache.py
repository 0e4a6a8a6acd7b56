"""A cache survives files and checkpoints exactly, and refuses what does not belong to it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rpo_lightning.cache import CachedResponse, CacheEntry, ExperienceCache
from rpo_lightning.errors import CacheError
from rpo_lightning.spans import cut_spans, extend_spans


def filled_cache() -> ExperienceCache:
    cache = ExperienceCache("abc")
    response = CachedResponse(np.array([5, 6, 2**31 - 1], np.int32), 0.75, True, False, ((0, 1), (4, 2)))
    cache.remember("with response", response)
    full = cache.entry("with response")
    full.visits, full.restart, full.state = 3, True, {"shortest_length": 2, "anchors": [[1, 2], [3]]}
    cache.entry("without response").visits = 1
    return cache


def contents(cache: ExperienceCache):
    return [
        (
            e.uid,
            e.visits,
            e.restart,
            e.state,
            e.response
            and (
                e.response.token_ids.tolist(),
                e.response.reward,
                e.response.correct,
                e.response.finished,
                e.response.spans,
            ),
        )
        for e in cache
    ]


def test_a_file_holds_everything(tmp_path):
    filled_cache().save(tmp_path / "cache.parquet")
    loaded = ExperienceCache("abc")
    loaded.load(tmp_path / "cache.parquet")
    assert contents(loaded) == contents(filled_cache())
    assert [p.name for p in tmp_path.iterdir()] == ["cache.parquet"]


def test_a_checkpoint_holds_everything_and_is_read_without_pickle(tmp_path):
    torch.save(filled_cache().state_dict(), tmp_path / "state.ckpt")
    loaded = ExperienceCache("abc")
    loaded.load_state_dict(torch.load(tmp_path / "state.ckpt", weights_only=True))
    assert contents(loaded) == contents(filled_cache())


def test_an_empty_cache_survives_too(tmp_path):
    ExperienceCache("abc").save(tmp_path / "cache.parquet")
    cache = filled_cache()
    cache.load(tmp_path / "cache.parquet")
    assert len(cache) == 0


def test_another_tokenizers_cache_is_refused(tmp_path):
    filled_cache().save(tmp_path / "cache.parquet")
    with pytest.raises(CacheError, match=r"cache\.parquet: made with another tokenizer"):
        ExperienceCache("xyz").load(tmp_path / "cache.parquet")
    with pytest.raises(CacheError, match="another tokenizer"):
        ExperienceCache("xyz").load_state_dict(filled_cache().state_dict())


def test_files_that_are_no_caches_are_refused(tmp_path):
    with pytest.raises(CacheError, match="no such cache file"):
        ExperienceCache("abc").load(tmp_path / "missing.parquet")
    (tmp_path / "text.parquet").write_text("hello")
    with pytest.raises(CacheError, match=r"text\.parquet: not a readable Parquet file"):
        ExperienceCache("abc").load(tmp_path / "text.parquet")


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    import pyarrow.parquet

    path = tmp_path / "cache.parquet"
    filled_cache().save(path)

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(pyarrow.parquet.ParquetWriter, "write_batch", fail)
    with pytest.raises(OSError, match="disk full"):
        filled_cache().save(path)
    cache = ExperienceCache("abc")
    cache.load(path)
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
