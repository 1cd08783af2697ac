"""One module of a merge: updates of one weight in, what stands in the result out."""
