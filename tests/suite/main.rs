mod artifact;
mod calibrate;
mod plan;
