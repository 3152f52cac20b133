"""The configuration: what is refused and how it is said, what is filled in, what a resumed run must share."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from ijepa_ds.config import Config, load_config, parse_config
from ijepa_ds.errors import UserError
from ijepa_ds.settings import DEEPSPEED_KEYS

FOLDER = Path(__file__).resolve().parents[1] / "ds_configs"
CONFIGS = sorted(set(FOLDER.glob("*.json")) - {FOLDER / "schema.json"})


def raw(**changes) -> dict:
    """The smallest configuration; ``changes`` replace values by dotted key, with __ for a dot; ... removes one."""
    config = {
        "train_batch_size": 128,
        "train_micro_batch_size_per_gpu": 16,
        "ijepa": {"run": {"name": "small"}, "data": {"train": "train.beton"}, "model": {"patch_size": 14}},
    }
    for key, value in changes.items():
        *parents, last = key.split("__")
        place = config
        for parent in parents:
            place = place.setdefault(parent, {})
        if value is ...:
            del place[last]
        else:
            place[last] = value
    return config


def problems(**changes) -> list[str]:
    """The problems of a changed configuration, one string each."""
    with pytest.raises(UserError) as refusal:
        parse_config(raw(**changes))
    first, *lines = str(refusal.value).split("\n  - ")
    assert first == f"config has {len(lines)} problem{'s' * (len(lines) > 1)}:"
    return lines


def problem(**changes) -> str:
    """The only problem."""
    (line,) = problems(**changes)
    return line


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "small.json"
    path.write_text(json.dumps(raw()))
    return path


# ------------------------------------------------------------------------------------------- what is accepted


def test_there_are_configs():
    assert CONFIGS


def stage_of(config: Config) -> int:
    """ZeRO's, 0 where the configuration does not name it."""
    return config.deepspeed["zero_optimization"].get("stage", 0)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_that_comes_with_the_project_is_valid(path):
    config = load_config(path)
    assert config.ijepa.run.name
    assert config.grid[0] >= 1 and config.global_batch % config.micro_batch == 0


def test_the_smallest_config_gets_the_defaults_of_the_released_run():
    config = parse_config(raw())
    assert (config.global_batch, config.micro_batch, config.grid, stage_of(config)) == (128, 16, (16, 16), 0)
    ours = config.ijepa
    assert (ours.model.encoder, ours.model.predictor_width, ours.model.predictor_depth) == ("huge", 384, 12)
    assert ours.data.crop_scale == (0.3, 1.0) and ours.data.image_size == (224, 224)
    recipe = ours.optimization
    assert (recipe.epochs, recipe.warmup_epochs) == (300, 40)
    assert (recipe.lr_start, recipe.lr_peak, recipe.lr_final) == (2e-4, 1e-3, 1e-6)
    assert (recipe.weight_decay, recipe.momentum) == ((0.04, 0.4), (0.996, 1.0))
    assert (ours.masks.sampler, ours.masks.num_targets, ours.masks.truncation_group) == ("multiblock", 4, 128)


def test_what_deepspeed_would_choose_otherwise_is_filled_in():
    plain = parse_config(raw()).deepspeed
    assert plain["gradient_clipping"] == 0.0
    assert plain["steps_per_print"] == 10**9 and plain["zero_allow_untested_optimizer"] is True
    assert plain["data_types"] == {} and plain["zero_optimization"] == {}
    zero = parse_config(raw(bf16={"enabled": True}, zero_optimization={"stage": 2})).deepspeed
    assert zero["data_types"] == {"grad_accum_dtype": "fp32"}
    assert zero["zero_optimization"] == {
        "stage": 2,
        "reduce_bucket_size": 50_000_000,
    }
    assert parse_config(raw(zero_optimization={"stage": 2})).deepspeed["data_types"] == {}


def test_what_is_given_is_not_filled_in():
    given = {
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 1, "reduce_bucket_size": 5, "allgather_bucket_size": 6, "overlap_comm": True},
        "data_types": {"grad_accum_dtype": "bf16"},
        "gradient_clipping": 3.0,
        "steps_per_print": 7,
    }
    config = parse_config(raw(**given)).deepspeed
    assert {key: config[key] for key in given} == given


def test_checking_changes_nothing_that_was_given():
    given = raw(zero_optimization={"stage": 2}, bf16={"enabled": True})
    before = json.dumps(given)
    parse_config(given)
    assert json.dumps(given) == before


def test_numbers_and_lists_become_what_the_settings_are():
    config = parse_config(
        raw(
            ijepa__data__image_size=28,
            ijepa__optimization={"epochs": 2, "warmup_epochs": 1},
            ijepa__data__crop_scale=[1, 1],
        )
    ).ijepa
    assert config.data.image_size == (28, 28)
    assert isinstance(config.optimization.epochs, float) and config.data.crop_scale == (1.0, 1.0)
    wide = parse_config(raw(ijepa__data__image_size=[28, 56]))
    assert wide.grid == (2, 4)


def test_null_is_accepted_where_a_setting_has_no_value():
    config = parse_config(raw(ijepa__data__validation=None, ijepa__masks={"context_tokens": None}))
    assert config.ijepa.data.validation is None and config.ijepa.masks.context_tokens is None
    assert problem(ijepa__model__predictor_width=None) == "ijepa.model.predictor_width = null must be a whole number"


def test_a_configuration_cannot_be_changed():
    config = parse_config(raw())
    with pytest.raises(ValidationError, match="frozen"):
        config.ijepa.run.seed = 3


# ------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"ijepa__model__pach_size": 3},
            "ijepa.model.pach_size is not a setting; did you mean patch_size?",
        ),
        (
            {"ijepa__optimisation": {}},
            "ijepa.optimisation is not a setting; did you mean optimization?",
        ),
        (
            {"train_batchsize": 1},
            "train_batchsize is not a key of DeepSpeed that this project uses; did you mean train_batch_size?",
        ),
        (
            {"zero_optimisation": {}},
            "zero_optimisation is not a key of DeepSpeed that this project uses; did you mean zero_optimization?",
        ),
        ({"bf_16": {}}, "bf_16 is not a key of DeepSpeed that this project uses; did you mean bf16?"),
        ({"ijpea": {}}, "ijpea is not a key of DeepSpeed that this project uses; did you mean ijepa?"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_name(changes, line):
    assert problem(**changes) == line


def test_an_unknown_key_that_is_near_to_none_is_refused_with_all_names():
    assert (
        problem(ijepa__checkpoint={"xyzzy": 1})
        == "ijepa.checkpoint.xyzzy is not a setting; valid: background, keep, keep_epochs, minutes, steps"
    )


@pytest.mark.parametrize(
    ("changes", "missing"),
    [
        ({"ijepa__run__name": ...}, ["ijepa.run.name"]),
        ({"ijepa__data": ...}, ["ijepa.data.train"]),
        ({"ijepa__model": {}}, ["ijepa.model.patch_size"]),
        ({"ijepa": ...}, ["ijepa.run.name", "ijepa.data.train", "ijepa.model.patch_size"]),
    ],
)
def test_a_missing_setting_is_named(changes, missing):
    assert problems(**changes) == [f"{key} is missing" for key in missing]


@pytest.mark.parametrize("value", [None, 0, -1, 1.0, 1.5, True, "16", [16]])
def test_batch_sizes_are_whole_and_positive(value):
    for key in ("train_batch_size", "train_micro_batch_size_per_gpu"):
        expected = "at least 1" if type(value) is int else "a whole number"
        assert problem(**{key: value}) == f"{key} = {json.dumps(value)} must be {expected}"
        assert problem(**{key: ...}) == f"{key} is missing"


@pytest.mark.parametrize(
    ("key", "value", "complaint"),
    [
        ("model__patch_size", "14", 'ijepa.model.patch_size = "14" must be a whole number'),
        ("model__patch_size", 14.0, "ijepa.model.patch_size = 14.0 must be a whole number"),
        ("model__patch_size", True, "ijepa.model.patch_size = true must be a whole number"),
        ("model__patch_size", 0, "ijepa.model.patch_size = 0 must be at least 1"),
        ("model__patch_size", [14], "ijepa.model.patch_size = [14] must be a whole number"),
        ("model__patch_size", 257, "ijepa.model.patch_size = 257 must be at most 256"),
        ("run__seed", -1, "ijepa.run.seed = -1 must be at least 0"),
        ("run__seed", 2**63, f"ijepa.run.seed = {2**63} must be at most"),
        ("run__name", 7, "ijepa.run.name = 7 must be a string"),
        ("compile", 1, "ijepa.compile = 1 must be true or false"),
        ("data__train", 3, "ijepa.data.train = 3 must name a file, or a list of files"),
        ("data__train", [], "ijepa.data.train = [] must name a file, or a list of files"),
        ("data__validation", ["a", 1], 'ijepa.data.validation = ["a", 1] must name a file, or a list of files'),
        ("data__workers", 0, "ijepa.data.workers = 0 must be at least 1"),
        ("data__crop_scale", 0.3, "ijepa.data.crop_scale = 0.3 must be a list of 2 numbers"),
        ("data__crop_scale", [0.3], "ijepa.data.crop_scale = [0.3] must be a list of 2 numbers"),
        ("data__crop_scale", [0.3, 1.1], "ijepa.data.crop_scale[1] = 1.1 must be at most 1"),
        ("data__mean", [0.5, 0.5, "a"], 'ijepa.data.mean[2] = "a" must be a number'),
        ("data__image_size", {"rows": 1}, 'ijepa.data.image_size = {"rows": 1} must be a list of 2 numbers'),
        ("optimization__lr_peak", "1e-3", 'ijepa.optimization.lr_peak = "1e-3" must be a number'),
        ("optimization__lr_peak", float("nan"), "ijepa.optimization.lr_peak = NaN must be a number"),
        ("optimization__lr_peak", float("inf"), "ijepa.optimization.lr_peak = Infinity must be a number"),
        pytest.param("optimization__epochs", 10**400, "must be a number", id="larger than any float"),
        ("optimization__epochs", 0, "ijepa.optimization.epochs = 0 must be at least 1e-06"),
        ("optimization__momentum", [0.996, 1.01], "ijepa.optimization.momentum[1] = 1.01 must be at most 1"),
        ("masks__sampler", "multblock", "must be one of multiblock, reference; did you mean multiblock?"),
        ("masks__sampler", 3, "ijepa.masks.sampler = 3 must be one of multiblock, reference"),
        ("monitor", [], "ijepa.monitor must be an object, not a list"),
        ("run", None, "ijepa.run must be an object, not null"),
    ],
)
def test_a_value_of_another_kind_or_range_is_refused(key, value, complaint):
    assert complaint in problem(**{f"ijepa__{key}": value})


@pytest.mark.parametrize("value", [None, [], "x", 3, True])
def test_the_ijepa_part_must_be_an_object(value):
    assert problem(ijepa=value).startswith("ijepa must be an object, not ")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"zero_optimization": {"stage": 3}}, "stage 3 would shard the weights that the target encoder's average"),
        ({"zero_optimization": {"stage": "two"}}, 'zero_optimization.stage = "two" cannot be used'),
        ({"zero_optimization": {"stage": 2, "round_robin_gradients": True}}, "breaks reading the fp32 weights"),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
            'offload_optimizer = {"device": "cpu"} is not supported',
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
            'offload_param = {"device": "cpu"} is not supported',
        ),
        ({"zero_optimization": {"stage": 2, "cpu_offload": True}}, "cpu_offload = true is not supported"),
        ({"zero_optimization": 2}, "zero_optimization must be an object, not a number"),
        ({"zero_optimization": {"stage": 2, "allgather_bucket_size": 7}}, "must be even, as NCCL aligns it"),
        ({"bf16": True}, "bf16 must be an object, not true or false"),
        ({"bf16": {"enabled": True}, "torch_autocast": {"enabled": True}}, "exclude each other; turn one off"),
        ({"fp16": {"enabled": True}}, "fp16 is not used here: fp16 needs loss scaling"),
        ({"optimizer": {"type": "AdamW"}}, "the optimizer is AdamW; set it in ijepa.optimization"),
        ({"scheduler": {}}, "scheduler is not used here: learning rate, weight decay and momentum are schedules"),
        ({"gradient_accumulation_steps": 2}, "it is derived from train_batch_size"),
        ({"activation_checkpointing": {}}, "set ijepa.model.activation_checkpointing"),
        ({"tensorboard": {"enabled": True}}, "see ijepa.monitor"),
    ],
)
def test_what_deepspeed_offers_but_cannot_work_is_refused_with_its_reason(changes, reason):
    assert reason in problem(**changes)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_zero_stages_up_to_two_are_accepted(stage):
    config = parse_config(raw(zero_optimization={"stage": stage, "round_robin_gradients": False}))
    assert stage_of(config) == stage


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"ijepa__data__image_size": 225},
            "ijepa.model.patch_size = 14 does not divide ijepa.data.image_size = 225; use an image size of 224",
        ),
        (
            {"ijepa__data__image_size": [224, 100]},
            "ijepa.model.patch_size = 14 does not divide ijepa.data.image_size = 100; use an image size of 98",
        ),
        (
            {"ijepa__data__image_size": 5},
            "ijepa.model.patch_size = 14 does not divide ijepa.data.image_size = 5; use an image size of 14",
        ),
        (
            {"ijepa__optimization": {"epochs": 10, "warmup_epochs": 11}},
            "ijepa.optimization.warmup_epochs = 11 is longer than the 10 epochs of the run",
        ),
        (
            {"ijepa__masks": {"target_scale": [0.2, 0.15]}},
            "ijepa.masks.target_scale = [0.2, 0.15] must be given as [smallest, largest]",
        ),
        ({"ijepa__model__width": 30}, "ijepa.model.width = 30 must be a multiple of 4"),
        (
            {"ijepa__model": {"patch_size": 14, "width": 64, "heads": 6}},
            "ijepa.model.width = 64 does not divide by ijepa.model.heads = 6",
        ),
        (
            {"train_micro_batch_size_per_gpu": 48},
            "train_micro_batch_size_per_gpu = 48 does not divide train_batch_size = 128",
        ),
        (
            {"ijepa__pipeline": {"stages": 2}, "zero_optimization": {"stage": 2}},
            "zero_optimization.stage = 2 does not go with ijepa.pipeline.stages = 2; set 1: a pipeline adds up whole "
            "gradients and shards AdamW's state",
        ),
        (
            {
                "ijepa__pipeline": {"stages": 3},
                "zero_optimization": {"stage": 1},
                "train_micro_batch_size_per_gpu": 32,
            },
            "train_micro_batch_size_per_gpu = 32 does not divide by ijepa.pipeline.stages = 3, whose processes share "
            "the target encoder's work on a micro-batch",
        ),
        (
            {"ijepa__pipeline": {"stages": 2}, "zero_optimization": {"stage": 1}, "wall_clock_breakdown": True},
            "wall_clock_breakdown = true does not go with ijepa.pipeline.stages = 2: DeepSpeed would start a timer "
            "twice, and end; leave it out",
        ),
        (
            {"ijepa__masks": {"corrections": ["random_cut"]}},
            "ijepa.masks.corrections are of ijepa.masks.sampler = reference; multiblock needs none: leave them out",
        ),
        (
            {"ijepa__masks": {"sampler": "reference", "corrections": ["last_row", "last_row"]}},
            'ijepa.masks.corrections = ["last_row", "last_row"] names one twice',
        ),
        (
            {"ijepa__masks": {"sampler": "reference", "corrections": ["last_rows"]}},
            'ijepa.masks.corrections[0] = "last_rows" must be one of random_cut, free_corner, last_row, two_numbers; '
            "did you mean last_row?",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused(changes, line):
    assert problem(**changes) == line


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/tmp", "a/"])
def test_a_run_name_that_would_leave_the_folder_of_runs_is_refused(name):
    assert problem(ijepa__run__name=name) == f"ijepa.run.name = {json.dumps(name)} must be a plain folder name"


@pytest.mark.parametrize(
    ("group", "fits"), [(16, True), (32, True), (128, True), (8, False), (24, False), (256, False)]
)
def test_a_truncation_group_holds_whole_micro_batches_and_fills_the_batch(group, fits):
    """Images of a group share one number of context tokens, so a micro-batch must lie in one group."""
    masks = {"sampler": "reference", "truncation_group": group}
    if fits:
        parse_config(raw(ijepa__masks=masks))
    else:
        line = problem(ijepa__masks=masks)
        assert line.startswith(f"ijepa.masks.truncation_group = {group} must be a multiple of") and "= 16" in line
    parse_config(raw(ijepa__masks={**masks, "sampler": "multiblock"}))  # which has no groups


def test_all_problems_are_reported_at_once():
    lines = problems(
        train_batch_size=0,
        fp16={},
        gradient_cliping=1,
        zero_optimization={"stage": 3},
        ijepa__run__name=...,
        ijepa__data__crop_ratio=[0, 1, 2],
        ijepa__model__encodr="huge",
        ijepa__optimization={"lr_peak": -1, "momentum": [2, "x"]},
        ijepa__monitor=7,
    )
    keys = [
        "fp16",
        "train_batch_size",
        "zero_optimization.stage",
        "ijepa.run.name",
        "ijepa.data.crop_ratio",
        "ijepa.model.encodr",
        "ijepa.optimization.lr_peak",
        "ijepa.optimization.momentum[0]",
        "ijepa.optimization.momentum[1]",
        "ijepa.monitor",
        "gradient_cliping",
    ]
    assert [line.split(" ")[0] for line in lines] == keys


def test_several_settings_that_do_not_go_together_are_reported_at_once():
    lines = problems(
        ijepa__data__image_size=225, ijepa__optimization={"epochs": 1}, train_micro_batch_size_per_gpu=48, bf16=3
    )
    assert [line.split(" ")[0] for line in lines] == [
        "bf16",
        "ijepa.model.patch_size",
        "ijepa.optimization.warmup_epochs",
        "train_micro_batch_size_per_gpu",
    ]


# ------------------------------------------------------------------------------------------- files and overrides


def test_a_file_that_is_missing_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.json does not exist; .* ds_configs/"):
        load_config(tmp_path / "none.json")
    with pytest.raises(UserError, match=r"cannot be read \(Is a directory\); give a file of ds_configs/"):
        load_config(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"{'a': 1}", b"\xff\xfe\x00", b'{"a": 1,}'])
def test_a_file_that_is_not_json_is_named_with_the_place(tmp_path, content):
    path = tmp_path / "broken.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"broken\.json is not valid JSON \(.+\); mend it there"):
        load_config(path)


@pytest.mark.parametrize("content", ["[]", "3", "null", '"text"'])
def test_a_file_that_holds_no_object_is_refused(tmp_path, content):
    path = tmp_path / "list.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"list\.json must hold one JSON object, not "):
        load_config(path)


def test_the_problems_of_a_file_begin_with_its_name(file):
    with pytest.raises(UserError, match=r"small\.json has 1 problem:\n  - ijepa\.run\.seed"):
        load_config(file, ["ijepa.run.seed=-1"])


def test_overrides_reach_nested_settings_in_the_order_given(file):
    config = load_config(
        file,
        [
            "train_batch_size=256",
            "ijepa.run.name=other",  # a bare word is a string
            'ijepa.data.train="a=b.beton"',  # as is a quoted one, equals sign and all
            "ijepa.data.validation=data/val=1.beton",
            "ijepa.data.image_size=[28,56]",
            "ijepa.optimization.epochs=50",  # of an object that the file does not have
            "zero_optimization.stage=2",
            "ijepa.run.seed=1",
            "ijepa.run.seed=2",
            "ijepa.model.activation_checkpointing=true",
            'ijepa.masks={"num_targets": 3}',
        ],
    )
    ours = config.ijepa
    assert (config.global_batch, stage_of(config), config.grid) == (256, 2, (2, 4))
    assert (ours.run.name, ours.run.seed, ours.optimization.epochs) == ("other", 2, 50.0)
    assert (ours.data.train, ours.data.validation) == ("a=b.beton", "data/val=1.beton")
    assert ours.model.activation_checkpointing is True and ours.masks.num_targets == 3


@pytest.mark.parametrize("override", ["ijepa.run.seed", "=3", "", "ijepa"])
def test_an_override_that_is_no_assignment_is_refused_with_an_example(file, override):
    with pytest.raises(UserError, match=r"is not KEY=JSON, such as --set ijepa\.data\.workers=4"):
        load_config(file, [override])


@pytest.mark.parametrize("override", ["train_batch_size.x=1", "ijepa.run.name.x=1", "ijepa.run.name.x.y=1"])
def test_an_override_inside_of_a_value_is_refused(file, override):
    with pytest.raises(UserError, match="is not an object, so nothing can be set inside it"):
        load_config(file, [override])


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("ijepa.run.seed=seven", 'ijepa.run.seed = "seven" must be a whole number'),
        ("ijepa.run.sede=7", "ijepa.run.sede is not a setting; did you mean seed?"),
        ("ijepa.optimization.lr_peak=.001", 'ijepa.optimization.lr_peak = ".001" must be a number'),
        ("ijepa.compile=True", 'ijepa.compile = "True" must be true or false'),
        ("ijepa.run=x", "ijepa.run must be an object, not a string"),
    ],
)
def test_overrides_are_checked_like_the_file(file, override, complaint):
    with pytest.raises(UserError) as refusal:
        load_config(file, [override])
    assert complaint in str(refusal.value)


# ------------------------------------------------------------------------------------------- what is recorded


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_effective_configuration_read_again_is_the_same(path):
    config = load_config(path)
    written = json.loads(json.dumps(config.as_dict()))
    assert parse_config(written) == config
    assert written == config.as_dict()


def test_the_recipe_that_earlier_runs_have_saved_is_still_theirs():
    """A run folder is compared by these keys and values: another one would refuse every run that is under way."""
    saved = {
        "run": {"name": "small", "seed": 0},
        "data": {
            "image_size": [224, 224],
            "crop_scale": [0.3, 1.0],
            "crop_ratio": [0.75, 4 / 3],
            "mean": [0.485, 0.456, 0.406],
            "std": [0.229, 0.224, 0.225],
        },
        "model": {
            "patch_size": 14,
            "encoder": "huge",
            **dict.fromkeys(("width", "depth", "heads", "mlp_ratio", "predictor_heads")),
            "predictor_width": 384,
            "predictor_depth": 12,
        },
        "masks": {
            "sampler": "multiblock",
            "num_targets": 4,
            "target_scale": [0.15, 0.2],
            "target_aspect_ratio": [0.75, 1.5],
            "context_scale": [0.85, 1.0],
            "context_tokens": None,
            "min_keep": 10,
            "truncation_group": 128,
        },
        "optimization": {
            "epochs": 300.0,
            "warmup_epochs": 40.0,
            "schedule_scale": 1.0,
            "lr_start": 2e-4,
            "lr_peak": 1e-3,
            "lr_final": 1e-6,
            "weight_decay": [0.04, 0.4],
            "momentum": [0.996, 1.0],
            "betas": [0.9, 0.999],
            "eps": 1e-8,
        },
    }
    ours = {f"ijepa.{section}.{key}": value for section, part in saved.items() for key, value in part.items()}
    deepspeeds = {"train_batch_size": 128, "bf16": {}, "torch_autocast": {}, "gradient_clipping": 0.0}
    since_added = {  # with values that leave everything as it was
        "ijepa.data.flip": False,
        "ijepa.masks.corrections": [],
        "ijepa.model.stochastic_positions": 0.0,
        "ijepa.objective.contexts": 1,
        "ijepa.objective.target_layers": 1,
        "ijepa.objective.predict_share": 1.0,
        "ijepa.objective.vicreg": 0.0,
        "ijepa.objective.vicreg_group": 32,
        "ijepa.objective.vicreg_width": 256,
        "ijepa.objective.vicreg_variance": 25.0,
        "ijepa.objective.vicreg_covariance": 1.0,
        "ijepa.optimization.schedule": "cosine",
        "ijepa.optimization.cooldown_epochs": 0.0,
    }
    assert parse_config(raw()).recipe() == ours | deepspeeds | since_added
    whole_numbers = parse_config(raw(ijepa__optimization={"epochs": 300}, ijepa__data__crop_scale=[0.3, 1]))
    assert json.dumps(whole_numbers.recipe()) == json.dumps(parse_config(raw()).recipe())


def test_values_changed_in_one_section_leave_the_others_and_the_original():
    config = parse_config(raw())
    changed = config.changed("data", image_size=(28, 56))
    assert changed.grid == (2, 4) and config.grid == (16, 16)
    assert changed.ijepa.model == config.ijepa.model and changed.ijepa.data.train == config.ijepa.data.train


def test_the_effective_configuration_is_a_copy():
    config = parse_config(raw())
    config.as_dict()["zero_optimization"]["stage"] = 1
    assert stage_of(config) == 0


CHANGEABLE = {
    "train_micro_batch_size_per_gpu": 32,
    "zero_optimization": {"stage": 2},
    "steps_per_print": 5,
    "ijepa__run__folder": "elsewhere",
    "ijepa__run__stop_after_steps": 5,
    "ijepa__run__deterministic": True,
    "ijepa__run__nonfinite_steps": 5,
    "ijepa__run__silence_seconds": 30,
    "ijepa__run__start_from": "runs/other",
    "ijepa__data__train": "moved.beton",
    "ijepa__data__validation": "val.beton",
    "ijepa__data__workers": 3,
    "ijepa__model__activation_checkpointing": True,
    "ijepa__monitor": {"log_steps": 1, "knn_epochs": 1},
    "ijepa__checkpoint": {"minutes": 1, "steps": 2, "keep": 3},
    "ijepa__compile": True,
    "ijepa__pipeline": {"stages": 1, "largest_bubble": 0.5},
}
FIXED = {
    "train_batch_size": 256,
    "bf16": {"enabled": True},
    "gradient_clipping": 1.0,
    "ijepa__run__name": "other",
    "ijepa__run__seed": 1,
    "ijepa__data__image_size": 28,
    "ijepa__data__crop_scale": [0.2, 1.0],
    "ijepa__data__std": [0.5, 0.5, 0.5],
    "ijepa__model__patch_size": 16,
    "ijepa__model__encoder": "tiny",
    "ijepa__model__predictor_depth": 6,
    "ijepa__masks": {"sampler": "reference"},
    "ijepa__optimization": {"epochs": 100},
}


@pytest.mark.parametrize("key", CHANGEABLE)
def test_a_resumed_run_may_change(key):
    assert parse_config(raw(**{key: CHANGEABLE[key]})).recipe() == parse_config(raw()).recipe()


@pytest.mark.parametrize("key", FIXED)
def test_a_resumed_run_must_share(key):
    before, after = parse_config(raw()).recipe(), parse_config(raw(**{key: FIXED[key]})).recipe()
    differing = {name for name in before if before[name] != after[name]}
    assert differing and all(name.startswith(key.replace("__", ".")) for name in differing)


def test_every_setting_is_either_changeable_or_part_of_the_recipe():
    """A new setting must be put on one of the two lists above: whether a resumed run may change it is a decision."""
    recipe = parse_config(raw()).recipe()
    settings = {
        f"ijepa.{section}.{name}" if isinstance(values, dict) else f"ijepa.{section}"
        for section, values in parse_config(raw()).as_dict()["ijepa"].items()
        for name in (values if isinstance(values, dict) else [""])
    }
    free = settings - recipe.keys()
    named = {key.replace("__", ".") for key in CHANGEABLE if key.startswith("ijepa")}
    assert {key for key in free if key not in named and key.rpartition(".")[0] not in named} == set()
    json.dumps(recipe)  # it is compared with what was read from a file


# ------------------------------------------------------------------------------------------- DeepSpeed


class Watched(dict):
    """A configuration that notes which of its keys are read."""

    def __init__(self, values: dict):
        super().__init__(values)
        self.keys_read: set[str] = set()

    def get(self, key, default=None):
        self.keys_read.add(key)
        return super().get(key, default)

    def __getitem__(self, key):
        self.keys_read.add(key)
        return super().__getitem__(key)

    def __contains__(self, key):
        self.keys_read.add(key)
        return super().__contains__(key)


def test_every_accepted_key_is_really_read_by_the_installed_deepspeed():
    """DeepSpeed ignores what it does not know; a key that it stopped reading would be ignored here as well."""
    from deepspeed.runtime.config import DeepSpeedConfig

    import ijepa_ds.engine  # noqa: F401  it readies DeepSpeed for machines with and without a GPU

    # The profiler's part is looked for among keys(), so it shows by being read alone.
    watched = Watched({"train_batch_size": 1, "train_micro_batch_size_per_gpu": 1, "flops_profiler": {}})
    DeepSpeedConfig(watched)
    assert watched.keys_read >= DEEPSPEED_KEYS
    assert "gradient_cliping" not in watched.keys_read


def test_the_accepted_keys_cannot_be_changed():
    assert isinstance(DEEPSPEED_KEYS, frozenset)
    assert isinstance(parse_config(raw()), Config)
