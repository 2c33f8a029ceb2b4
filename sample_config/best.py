# Our recipe: put after base.py (demo.py has it already). Against the paper's: [CLS] learns from the data
# alone which way the light moves, and the DOM head knows where DOMs are. Judged on small models and simulated
# events.
cls_target = "charge+motion"  # study cls: 500 labels give a smaller error than 8,000 after the paper's target
dom_head = "position"  # study cls: val_dom_loss 3.6 instead of 4.9 after 19,200 events
