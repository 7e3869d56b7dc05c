def native_tests(): pass
def check_all(python): pass
