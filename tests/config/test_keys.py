"""What is known of the config keys beside their types, against lists kept by hand."""

import pytest

import portmoe
from portmoe.config import Config
from portmoe.config.keys import walk
from portmoe.config.messages import sections
from portmoe.config.section import ModelSection
from portmoe.ops import OPERATIONS

# Where a run lives, how it is laid out, computed, watched and saved, and how long it lasts.
SAME_RUN = [
    "JOB_NAME",
    "run.directory",
    "run.collective_timeout",
    "ckpt",
    "data.micro_num",
    "data.global_batch_size",
    "data.max_global_batch_size",
    "data.valid_micro_num",
    "data.valid_every",
    "data.total_steps",
    "data.num_epochs",
    "data.valid_folder",
    "data.on_bad_sample",
    "data.cache_folder",
    "run.name",
    "eval",
    "log",
    "lr_scheduler.total_steps",
    "model.from_pretrained",  # a folder: what it holds is the architecture's keys and the weights
    "model.checkpoint",
    "model.checkpoint_offload",
    "model.num_chunks",
    "model.use_flash_attn",
    "moe.enable_token_rearrange_opt",
    "moe.use_tutel",
    "moe.moe_implementation",
    "moe.expert_in_one_shard",
    "parallel",
    "ops",
    "trainer",
    "cudnn_deterministic",
    "monitor",
]

NO_EFFECT = [
    "ckpt.load_ckpt_folder",
    "ckpt.async_upload_tmp_folder",
    "ckpt.oss_snapshot_freq",
    "data.empty_cache_and_diag_interval",
    "data.diag_outlier_ratio",
    "hybrid_zero_optimizer.overlap_sync_grad",
    "hybrid_zero_optimizer.overlap_sync_param",
    "hybrid_zero_optimizer.reduce_bucket_size",
    "model.embed_split_hidden",
    "model.parallel_output",
    "trainer.deepspeed.gather_16bit_weights_on_model_save",
    "cudnn_benchmark",
    "monitor.alert.feishu_alert_address",
    "monitor.alert.light_monitor_address",
    "monitor.alert.alert_file_path",
]


@pytest.fixture(scope="module")
def entries():
    return {entry.path: entry for entry in walk(portmoe.load_config("tiny_moe4"))}


def test_the_keys_that_leave_a_run_the_same_run(entries):
    marked = {path for path, entry in entries.items() if entry.key.same_run and not entry.key.no_effect}
    assert marked == {
        path
        for path in entries.keys() - set(NO_EFFECT)
        if any(f"{path}.".startswith(f"{same}.") for same in SAME_RUN)
    }


def test_the_keys_without_effect_leave_a_run_the_same_run(entries):
    void = {path: entry for path, entry in entries.items() if entry.key.no_effect}
    assert sorted(void) == sorted(NO_EFFECT)
    assert all(entry.key.same_run for entry in void.values())


def test_the_keys_that_ask_for_a_kind_of_implementation(entries):
    assert {path: entry.key.asks_for for path, entry in entries.items() if entry.key.asks_for} == {
        "moe.use_fused_gating": ("topk_gating",),
        "moe.use_tutel": ("topk_gating",),
        "moe.enable_token_rearrange_opt": ("dispatch", "combine"),
        "model.use_flash_attn": ("attention",),
    }
    assert {op for entry in entries.values() for op in entry.key.asks_for} <= OPERATIONS.keys()


def test_a_type_is_walked_as_its_configs_are_and_into_optional_sections(entries):
    family = {ModelSection: type(portmoe.load_config("tiny_moe4").model)}
    of_type = {entry.path for entry in walk(Config, family)}
    below = {path for path in of_type if path.startswith("ckpt.load_ckpt_info.")}
    assert len(below) == 3
    assert of_type - below == set(entries)
    assert dict(sections())["ckpt.load_ckpt_info"].__name__ == "LoadCheckpointConfig"
