# How is a DOM embedded, by a table of vectors, by its position, or by both added? by position is best of
# pretrain.py; embedding_labels.py tells what it is worth for the direction.
shared = ("sample_config/study/train.py --batch_size=64 --max_steps=1560 --cooldown_steps=780 "
          "--eval_interval=195 --cls_target=charge+motion --dom_head=position")
arms = {"table": "sample_config/ablation/table.py", "both": "sample_config/ablation/positions_and_table.py"}
learning_rates = "0.0025,0.005,0.01"
widen = 1
out_dir = "out/study/embedding"
