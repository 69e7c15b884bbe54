
mod http;
