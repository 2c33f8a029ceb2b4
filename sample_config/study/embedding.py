# How is a DOM embedded: by its position, by a learned table, or both? Other studies compare with positions.
arms = {"positions": "", "table": "sample_config/ablation/table.py",
        "both": "sample_config/ablation/positions_and_table.py"}
seeds = 2
out_dir = "out/study/embedding"
