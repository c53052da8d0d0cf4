"""The demo's text: the same bytes for the same step, files on one side only."""

import pytest
import torch
from torch.utils.data import DataLoader

from pretrain_merge.demo.corpus import TrainingBlocks, ValidationBlocks, load_corpus
from pretrain_merge.errors import ConfigError, MissingDependencyError

TEXT = torch.arange(2000, dtype=torch.int64).remainder(251).to(torch.uint8)


def blocks(**changes):
    return TrainingBlocks(TEXT, **({"block_length": 16, "num_blocks": 100, "seed": 3} | changes))


def stack(data):
    return torch.stack([data[index]["input_ids"] for index in range(len(data))])


def library(folder, num_files=40, num_bytes=30_000):
    """A folder that looks like a standard library; every file repeats a byte of its own."""
    for index in range(num_files):
        path = folder / f"package{index % 3}" / f"module{index}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes([index]) * num_bytes)
    return folder


def test_a_block_depends_on_seed_and_index_alone():
    assert torch.equal(stack(blocks()), stack(blocks()))
    assert torch.equal(stack(blocks(num_blocks=100)), stack(blocks(num_blocks=500))[:100])
    assert not torch.equal(stack(blocks()), stack(blocks(seed=4)))


def test_a_block_is_a_contiguous_piece_of_the_text():
    for block in stack(blocks()):
        starts = (TEXT.long() == block[0]).nonzero().flatten().tolist()
        assert any(torch.equal(TEXT[start : start + 16].long(), block) for start in starts)


def test_blocks_come_from_all_over_the_text():
    text = torch.cat([torch.full((1000,), value, dtype=torch.uint8) for value in range(8)])
    seen = stack(TrainingBlocks(text, block_length=4, num_blocks=400, seed=0)).float().mean(dim=1).round()
    assert torch.bincount(seen.long(), minlength=8).min() > 20  # 50 expected; 20 is 4.5 standard deviations below


def test_a_branch_goes_on_with_the_runs_own_blocks():
    assert torch.equal(stack(blocks(first=40, num_blocks=60)), stack(blocks())[40:])


def test_workers_change_nothing():
    def batches(num_workers):
        return [batch["input_ids"] for batch in DataLoader(blocks(), batch_size=10, num_workers=num_workers)]

    for alone, shared in zip(batches(0), batches(2), strict=True):
        assert torch.equal(alone, shared)


def test_validation_blocks_are_fixed_side_by_side_and_spread_over_the_text():
    data = ValidationBlocks(TEXT, block_length=16, num_blocks=10)
    assert torch.equal(stack(data), torch.stack([TEXT[start : start + 16].long() for start in range(0, 2000, 200)]))


@pytest.mark.parametrize("index", [-1, 100])
def test_an_index_outside_the_data_set_is_refused(index):
    with pytest.raises(IndexError):
        blocks()[index]


def test_blocks_that_do_not_fit_are_refused_with_what_does():
    with pytest.raises(ConfigError, match=r"(?s)block_length: 3000 .* text has 2000.* 1 to 2000"):
        blocks(block_length=3000)
    with pytest.raises(ConfigError, match=r"(?s)num_blocks: 200 .* 2000 bytes.* 1 to 125 blocks"):
        ValidationBlocks(TEXT, block_length=16, num_blocks=200)


def test_every_file_is_on_one_side_and_a_new_file_moves_no_other(tmp_path):
    corpus = load_corpus(library(tmp_path))
    train, validation = (set(side.unique().tolist()) for side in (corpus.train, corpus.validation))
    assert train.isdisjoint(validation)
    assert train | validation == set(range(40))
    assert 0 < len(validation) < 12
    library(tmp_path, num_files=60)
    assert validation <= set(load_corpus(tmp_path).validation.unique().tolist())
    assert train <= set(load_corpus(tmp_path).train.unique().tolist())


def test_packages_tests_and_tables_are_no_text(tmp_path):
    library(tmp_path)
    for name in ("site-packages", "test", "json/tests", "encodings", "__pycache__"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "module.py").write_bytes(bytes([200]) * 1000)
    (tmp_path / "data.txt").write_bytes(bytes([200]) * 1000)
    corpus = load_corpus(tmp_path)
    assert 200 not in corpus.train
    assert 200 not in corpus.validation
    assert corpus.num_files == 40


def test_too_little_text_says_how_much_is_needed_and_where_to_get_it(tmp_path):
    library(tmp_path, num_files=3, num_bytes=100)
    with pytest.raises(MissingDependencyError, match=r"(?s)300 bytes .* 3 files.* 1000000 bytes.* ships its source"):
        load_corpus(tmp_path)


def test_the_standard_library_is_text_enough():
    corpus = load_corpus()
    assert len(corpus.train) > 5_000_000
    assert 0.03 < len(corpus.validation) / len(corpus.train) < 0.3
    assert bytes(corpus.train.tolist()[:100_000]).isascii()  # source text, in order of file names
