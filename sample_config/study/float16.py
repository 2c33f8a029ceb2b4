# What is lost if DOM ids pass through float16, as in the published code? 5160 ids become 3338. Exact ids are
# positions of embedding.py; fewer ids are easier to guess, so transfer.py has to tell. Needs a copy of the
# data so rounded:
#     cp -r data/study data/study_float16
#     python -c "
#     import glob, numpy, data
#     for path in glob.glob('data/study_float16/*_pulses.bin'):
#         pulses = numpy.memmap(path, data.PULSE, 'r+')
#         pulses['dom'] = (pulses['dom'] + 1).astype('float16').astype('uint16') - 1"
arms = {"float16": "--data_dir=data/study_float16"}
learning_rates = "0.01,0.02,0.04"
seeds = 2
out_dir = "out/study/float16"
