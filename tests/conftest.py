from hypothesis import settings

settings.register_profile("subbyte", deadline=None, print_blob=True)
settings.load_profile("subbyte")
