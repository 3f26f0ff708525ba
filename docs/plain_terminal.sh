# Sourced by every %%bash cell (BASH_ENV in conf.py). Jupyter tells programs that they write to a colour terminal;
# the pages want what a pipe gets: no colours and no progress bars.
unset FORCE_COLOR CLICOLOR CLICOLOR_FORCE
export TERM=dumb
