"""A recipe: the stages that run, in which order, and those that are done.

`sections` and `plan` expand a config to steps with their edges and run them;
`preflight` and `given_weights` answer mistakes and say sizes before anything runs;
`run_folder` knows what is finished or begun, `inputs` and `settings` what counts;
`shipped` has the weights of the package.
"""
