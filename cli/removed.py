"""Flags of earlier versions, each with its replacement."""

REMOVED = {
    "grad_accum_steps": "Use --batch_size for the blocks of a step, and --micro_batch_size for those at once",
    "oom": "Lower --micro_batch_size, which leaves the steps as they are",
    "text_template": "Pass the template to --text_column",
    "model_revision": "Pass --model ID@REVISION",
    "dataset_revision": "Pass --dataset ID@REVISION",
    "warmup_ratio": "Pass a fraction below 1 to --warmup_steps",
    "on_nonfinite": "Use --max_skipped_steps",
    "max_skips": "Use --max_skipped_steps",
    "init_from_checkpoint": "Pass a saved model, such as runs/old/model, to --model",
    "merge_lora": "Run export.py --model runs/x/model --out DIR afterwards",
    "merge": "Run export.py --model MODEL --out DIR",
    "num_workers": "Remove it: batches are read in the training process",
    "worker_timeout": "Remove it: batches are read in the training process",
    "on_save_error": "Remove it: a run stops if it cannot save, and goes on with --resume",
}
