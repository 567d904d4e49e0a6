"""Keys of a group that say how often it is drawn and how its conditions drop out."""

import json

import pytest

from echo4o.data.errors import DataError
from echo4o.data.loader import LoaderConfig, PackedLoader
from echo4o.data.packing import Packer, PackingConfig
from echo4o.data.sample import ConditionDropout, Sample, Segment
from echo4o.data.sources import build_sources
from tests.data.rows_on_disk import VAE, build_group, context, encoded, write_parquet


def config(tmp_path, top=None, **groups):
    """A dataset config of groups that all read the same captions."""
    rows = [{"image": encoded(), "captions": json.dumps({"c": f"caption {n}"})} for n in range(6)]
    write_parquet(tmp_path / "data" / "0.parquet", rows)
    group = {"dataset_names": ["data"], "type": "t2i_pretrain", "image_transform_args": VAE}
    info = {"t2i_pretrain": {"data": {"data_dir": "data"}}}
    return {**(top or {}), **{name: {**group, **keys} for name, keys in groups.items()}, "dataset_info": info}


def test_shares_as_written(tmp_path):
    schedule = [{"step": 0, "weight": 1}, {"step": 100, "weight": 4, "interpolate": "linear"}]
    groups = {"a": {"weight": 2}, "b": {"weight": schedule, "weight_by": "samples"}, "c": {"replay_share": 0.1}}
    a, b, c = build_sources(config(tmp_path, {"weight_by": "tokens"}, **groups), context(tmp_path))
    assert (a.weight, a.weight_by, a.describe_share()) == (2, "tokens", "weight 2 by tokens")
    assert (b.weight_at(0), b.weight_at(50), b.weight_at(500), b.weight_by) == (1, 2.5, 4, "samples")
    assert (c.replay_share, c.describe_share()) == (0.1, "a share of 0.1 by tokens")
    (plain,) = build_sources(config(tmp_path, a={"weight": 2}), context(tmp_path))
    assert plain.weight_by == "samples" and plain.drawn_by_weight_alone and not plain.subset


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"weight_by": "token"}, "did you mean 'tokens'"),
        ({"weight_by": 1}, "must be samples or tokens"),
        ({"weight": 1, "replay_share": 0.1}, "keep one of them"),
        ({"replay_share": 1.5}, "between 0 and 1"),
        ({"replay_share": "10%"}, "must be a number"),
        ({"weight": []}, "step 0"),
        ({"weight": [1, 2]}, r"weight\[0\].*an entry such as"),
        ({"weight": [{"step": 5, "weight": 1}]}, "step 0"),
        ({"weight": [{"step": 0, "weight": 1}, {"step": 0, "weight": 2}]}, "ascend"),
        ({"weight": [{"steps": 0, "weight": 1}]}, "did you mean 'step'"),
        ({"weight": [{"weight": 1}]}, "lacks step"),
        ({"weight": [{"step": 0.5, "weight": 1}]}, r"weight\[0\].step"),
        ({"weight": [{"step": 0, "weight": -1}]}, "not be negative"),
        ({"weight": [{"step": 0, "weight": 1, "interpolate": "cosine"}]}, "must be linear"),
        ({"weight": [{"step": 0, "weight": 1, "interpolate": "linear"}]}, "before step 0"),
        ({"text_cond_dropout_prob": 2}, "between 0 and 1"),
        ({"vae_dropout_prob": 0.1}, "did you mean 'vae_cond_dropout_prob'"),
        ({"replay": 0.1}, "did you mean 'replay_share'"),
    ],
)
def test_wrong_keys_are_named(tmp_path, keys, message):
    with pytest.raises(DataError, match=message):
        build_sources(config(tmp_path, a=keys), context(tmp_path))


def test_a_wrong_key_beside_the_groups_is_named(tmp_path):
    with pytest.raises(DataError, match="did you mean 'weight_by'"):
        build_sources(config(tmp_path, {"weigth_by": "tokens"}, a={"weight": 1}), context(tmp_path))
    with pytest.raises(DataError, match="weight_by"):
        build_sources(config(tmp_path, {"weight_by": ["tokens"]}, a={"weight": 1}), context(tmp_path))


# --- dropout --------------------------------------------------------------------------------------------------------

RUN = PackingConfig(1, 2, 3, 4, text_cond_dropout_prob=0.3, vae_cond_dropout_prob=0.4, all_refs_dropout_prob=0.2)


def segments(num_texts=3):
    return tuple(Segment("text", text_ids=(5,), droppable=True, loss=True) for _ in range(num_texts))


def test_own_probabilities_change_what_is_dropped_and_nothing_else():
    packer = Packer(RUN)
    for seed in range(200):
        run, own, same = (
            packer.decide(segments(), seed, dropout)
            for dropout in (None, ConditionDropout(text_cond_dropout_prob=0.9), ConditionDropout())
        )
        assert run == same
        assert (run.timesteps, run.noise_seeds) == (own.timesteps, own.noise_seeds)
        assert sum(own.dropped) >= sum(run.dropped) or not any(own.dropped)
    own = Packer(PackingConfig(1, 2, 3, 4, text_cond_dropout_prob=0.9))
    dropout = ConditionDropout(text_cond_dropout_prob=0.9, all_refs_dropout_prob=0.0)
    assert all(packer.decide(segments(), seed, dropout) == own.decide(segments(), seed) for seed in range(50))


def test_a_packed_sample_drops_by_its_own():
    packer = Packer(RUN)
    samples = [Sample(segments(), seed=n, dropout=ConditionDropout(text_cond_dropout_prob=0.0)) for n in range(40)]
    assert packer.pack(samples).sequence_length == 40 * 9 == sum(map(packer.laid_down_tokens, samples))


def test_each_group_drops_by_its_own_or_by_the_run(tmp_path):
    groups = {"always": {"text_cond_dropout_prob": 1.0}, "never": {"text_cond_dropout_prob": 0}, "run": {}}
    groups = {name: {**keys, "weight": 1} for name, keys in groups.items()}
    built = build_sources(config(tmp_path, **groups), context(tmp_path))
    limits = LoaderConfig(100, 120, 60, 50, 5, num_workers=0)
    packer = Packer(PackingConfig(1, 2, 3, 4, max_latent_size=8, text_cond_dropout_prob=0.5))
    loader, lengths = PackedLoader(built, packer, limits), {name: set() for name in groups}
    for _ in range(40):
        batch = next(loader)
        for address, num_tokens in zip(batch.sample_addresses, batch.sample_lens, strict=True):
            lengths[address[0]].add(num_tokens)
    whole = built[1].source.plan(0, 0).num_tokens
    text = len("caption 0") + 2
    assert lengths == {"always": {whole - text}, "never": {whole}, "run": {whole, whole - text}}
    assert built[2].source.plan(0, 0).dropout is None


def test_keys_are_for_every_kind(tmp_path):
    rows = [{"instruction_list": ["x"], "image_list": [encoded(), encoded()]}]
    write_parquet(tmp_path / "data" / "0.parquet", rows)
    for kind in ("multi_ref", "unified_edit"):
        keys = {"all_refs_dropout_prob": 0.5, "max_rows": 1, "weight_by": "tokens"}
        group = build_group(tmp_path, kind, {"data_dir": "data"}, settings=keys)
        assert group.source.plan(0, 0).dropout == ConditionDropout(all_refs_dropout_prob=0.5)
