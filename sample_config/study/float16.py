# What is lost if DOM ids pass through float16, as in the published code? 5160 ids become 3338. Needs a copy of the data so rounded:
#     cp -r data/study data/study_float16
#     python -c "
#     import glob, numpy, data
#     for path in glob.glob('data/study_float16/*_pulses.bin'):
#         pulses = numpy.memmap(path, data.PULSE, 'r+')
#         pulses['dom'] = (pulses['dom'] + 1).astype('float16').astype('uint16') - 1"
arms = {"exact": "", "float16": "--data_dir=data/study_float16"}
out_dir = "out/study/float16"
