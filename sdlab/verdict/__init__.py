"""Is a synthetic set any good, how sure is that, and compared with what?"""
