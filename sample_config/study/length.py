# How many pulses of an event? 64 is that of the other studies. Needs the events in other lengths, N = 32, 127 and 256:
#     python prepare.py sample_config/study/prepare.py --max_pulses=N --data_dir=data/studyN
arms = {"max_pulses/32": "--data_dir=data/study32", "max_pulses/64": "", "max_pulses/127": "--data_dir=data/study127",
        "max_pulses/256": "--data_dir=data/study256"}
out_dir = "out/study/length"
