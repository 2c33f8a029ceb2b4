# [CLS] also predicts a line fit, a first guess of the direction. Put after base.py; demo.py
# has it already.
cls_target = "charge+line_fit"
