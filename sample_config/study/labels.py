# Do labels go further after pretraining? The direction after the paper's recipe, after best.py's and from
# scratch; all weights trained in few steps (tuned) or in many (longer), or the head alone (frozen). val tunes
# the learning rate, report reports. From scratch the events that the others are pretrained on have labels
# too; data/study_all:
#     python prepare.py sample_config/study/prepare.py --data_dir=data/study_all \
#         "--splits={'finetune': (1, 14), 'val': (15, 15), 'report': (16, 16)}"
script = "finetune.py"
shared = "sample_config/study/finetune.py --direction_loss=vmf --batch_size=64 --val_events=2000"
arms = {f"{arm}/{n}":
        f"--pretrained=out/study/pretrain/{arm.partition('/')[0]}/seed{{seed}}/ckpt.pt --train_events={n} "
        f"--max_steps={steps} --freeze_backbone={arm.endswith('frozen')}"
        for arm, runs in {
            "best/tuned": {100: 100, 500: 100, 2000: 200, 8000: 250, 32000: 500},
            "best/longer": {500: 1000, 2000: 1000, 8000: 1000, 32000: 2000},
            "best/frozen": {100: 100, 500: 100, 2000: 200, 8000: 250, 32000: 500},
            "paper/tuned": {100: 100, 500: 100, 2000: 200, 8000: 250, 32000: 500},
            "paper/longer": {500: 1000, 2000: 1000, 8000: 1000, 32000: 2000},
            "paper/frozen": {500: 100, 32000: 500}}.items()
        for n, steps in runs.items()}
arms = arms | {f"scratch/longer/{n}": f"--data_dir=data/study_all --train_events={n} --max_steps={steps}"
               for n, steps in {500: 1000, 2000: 1000, 8000: 1000, 32000: 2000, 128000: 4000}.items()}
learning_rates = "0.0005,0.001,0.002"
widen = 1
metric = "val_angle_mean"
report = "report"
wide = "report_angle_mean"
out_dir = "out/study/labels"
