# The benchmark's task in the form InternEvo reads, written from the task's description.
import os  # some people's files look up their bucket

JOB_NAME = "7b_moe_train"
ALERTS = False

SEQUENCE = 2048
WIDTH = 4096
HEADS = 32
RATIO = 4 / 3
LAYERS = 32
VOCABULARY = 103168
SAVE_EVERY = 50
BUCKET = os.environ.get("BUCKET")
FOLDER = "local:checkpoints"

ckpt = dict(
    enable_save_ckpt=False,
    save_ckpt_folder=FOLDER + "/7b",
    load_ckpt_folder=f"{FOLDER}/{JOB_NAME}/",
    load_ckpt_info=dict(path=f"{FOLDER}/start", content=("model",), ckpt_type="internevo"),
    auto_resume=True,
    checkpoint_every=SAVE_EVERY,
    async_upload=True,
    async_upload_tmp_folder=f"/dev/shm/{JOB_NAME}",
    oss_snapshot_freq=int(SAVE_EVERY / 2),
)

data = dict(
    seq_len=SEQUENCE,
    micro_num=8,
    micro_bsz=2,
    valid_micro_num=4,
    valid_every=50,
    pack_sample_into_one=False,
    total_steps=50,
    skip_batches="",
    rampup_batch_size="",
    min_length=50,
    train_folder=None,
    valid_folder=None,
    empty_cache_and_diag_interval=200,
    diag_outlier_ratio=1.1,
)

grad_scaler = dict(
    fp16=dict(initial_scale=2**16, min_scale=1, growth_interval=1000),
    growth_factor=2,
    backoff_factor=0.5,
    max_scale=2**24,
    hysteresis=2,
)
hybrid_zero_optimizer = dict(
    overlap_sync_grad=False,
    overlap_sync_param=False,
    reduce_bucket_size=512 * 1024 * 1024,
    clip_grad_norm=1.0,
)
loss = dict(label_smoothing=0, moe_loss_coeff=0.1)
adam = dict(lr=1e-4, adam_beta1=0.9, adam_beta2=0.95, adam_beta2_c=0, adam_eps=1e-8, weight_decay=0.01)
lr_scheduler = dict(
    total_steps=data["total_steps"], init_steps=0, warmup_ratio=0.01, eta_min=1e-5, last_epoch=-1
)
beta2_scheduler = dict(init_beta2=adam["adam_beta2"], c=adam["adam_beta2_c"], cur_iter=-1)

use_fp32_norm = False
model = dict(
    checkpoint=False,
    num_attention_heads=HEADS,
    embed_split_hidden=True,
    vocab_size=VOCABULARY,
    embed_grad_scale=1,
    parallel_output=True,
    hidden_size=WIDTH,
    num_layers=LAYERS,
    mlp_ratio=RATIO,
    apply_post_layer_norm=False,
    dtype="torch.bfloat16",
    norm_type="rmsnorm",
    layer_norm_epsilon=1e-5,
    use_flash_attn=True,
    qk_interleaved=False,
    num_chunks=1,
    num_experts=4,
    moe_use_residual=False,
    moe_type="GShard",
)
"""A text between the assignments, as these files have."""
moe = dict(
    top_k=2,
    capacity_factor=1.0,
    eval_capacity_factor=1.0,
    min_capacity=4,
    noisy_gate_policy=None,
    drop_tokens=True,
    use_rts=True,
    use_fused_gating=True,
    enable_token_rearrange_opt=True,
    use_tutel=True,
)
parallel = dict(
    zero1=dict(size=-1, fsdp=False),
    tensor=dict(size=1, mode="mtp"),
    pipeline=dict(size=1, interleaved_overlap=True),
    weight=dict(size=1, overlap=True, memory_pool=True),
)

cudnn_deterministic = False
cudnn_benchmark = False
monitor = dict(
    alert=dict(
        enable_feishu_alert=ALERTS,
        feishu_alert_address=None,
        light_monitor_address=None,
        alert_file_path=os.path.join("alerts", JOB_NAME),
    ),
    tensorboard=dict(queue_max_length=10),
)

model_type = "INTERNLM_MoE"
metric_dtype = "fp32"
