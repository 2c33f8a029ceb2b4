# Do labels go further after pretraining? The direction after the paper's recipe, after best.py's and from
# scratch; all weights trained (tuned) or the head alone (frozen). val tunes the learning rate, report
# reports. From scratch the events that the others are pretrained on have labels too; data/study_all:
#     python prepare.py sample_config/study/prepare.py --data_dir=data/study_all \
#         "--splits={'finetune': (1, 14), 'val': (15, 15), 'report': (16, 16)}"
script = "finetune.py"
shared = "sample_config/study/finetune.py --direction_loss=vmf --batch_size=64 --val_events=2000"
arms = {f"{recipe}/{kind}/{n}":
        f"--pretrained=out/study/pretrain/{recipe}/seed{{seed}}/ckpt.pt --train_events={n} "
        f"--max_steps={steps} --freeze_backbone={kind == 'frozen'}"
        for recipe in ("best", "paper") for kind in ("tuned", "frozen")
        for n, steps in ((100, 100), (500, 100), (2000, 200), (8000, 250), (32000, 500))
        if (recipe, kind) != ("paper", "frozen") or n in (500, 32000)}
arms = arms | {f"scratch/tuned/{n}": f"--data_dir=data/study_all --train_events={n} --max_steps={steps}"
               for n, steps in ((500, 200), (2000, 400), (8000, 1000), (32000, 2000))}
learning_rates = "0.0005,0.001,0.002"
widen = 1
metric = "val_angle_mean"
report = "report"
wide = "report_angle_mean"
out_dir = "out/study/labels"
