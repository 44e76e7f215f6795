from absent_slices import absent_slices, kept_programs  # noqa: F401
