//! The model's text room as the HTTP edge wants it.

use std::sync::Arc;

use crate::admission::{Chat, Codec, EncodeError, Piece, TemplateError, TextStream};
use crate::ids::TokenId;
use crate::text::{self, Start, Stops, StreamOptions, Tokenizer};

/// Tokenizer and chat template of the served model.
pub struct ModelCodec {
    tokenizer: Arc<Tokenizer>,
    vocab: usize,
    longest: usize,
}

impl ModelCodec {
    /// `vocab` is the width of the logits.
    pub fn new(tokenizer: Arc<Tokenizer>, vocab: usize) -> Self {
        let longest = tokenizer.longest_token_bytes();
        ModelCodec { tokenizer, vocab, longest }
    }
}

impl Codec for ModelCodec {
    fn encode(&self, text: &str, add_special_tokens: bool, parse_special: bool) -> Result<Vec<TokenId>, EncodeError> {
        self.tokenizer.encode(text, add_special_tokens, parse_special).map_err(|e| EncodeError { message: e.to_string() })
    }

    fn decode(&self, ids: &[TokenId], skip_special: bool) -> String {
        self.tokenizer.decode(ids, skip_special)
    }

    fn token_bytes(&self, id: TokenId) -> Vec<u8> {
        self.tokenizer.token_bytes(id)
    }

    fn is_special(&self, id: TokenId) -> bool {
        self.tokenizer.is_special(id)
    }

    fn vocab(&self) -> usize {
        self.vocab
    }

    fn max_token_bytes(&self) -> Option<usize> {
        self.tokenizer.keeps_all_text().then_some(self.longest)
    }

    fn render(&self, chat: &Chat<'_>) -> Result<Vec<TokenId>, TemplateError> {
        let Chat { messages, tools, add_generation_prompt, continue_final_message, kwargs } = *chat;
        self.tokenizer
            .render(messages, tools, add_generation_prompt, continue_final_message, kwargs)
            .map_err(|error| TemplateError { message: error.to_string() })
    }

    fn stream<'a>(&'a self, start: Start, stop: &Stops, include_stop: bool, min_tokens: u32) -> Box<dyn TextStream + Send + 'a> {
        let options = StreamOptions { skip_special: true, start, stops: stop.clone(), min_tokens };
        let kept = if include_stop { stop.clone() } else { Stops::default() };
        Box::new(Stream { text: Some(text::TextStream::new(self.tokenizer.clone(), options)), kept })
    }
}

struct Stream {
    /// Gone once it is finished.
    text: Option<text::TextStream>,
    /// The stop strings, when they are part of the answer.
    kept: Stops,
}

impl TextStream for Stream {
    fn push(&mut self, id: TokenId) -> Piece {
        let Some(stream) = &mut self.text else { return Piece::default() };
        let text::Piece { mut text, stopped } = stream.push(id);
        if let Some(stop) = stopped.and_then(|i| self.kept.texts().nth(i)) {
            text.push_str(stop);
        }
        Piece { text, stopped }
    }

    fn finish(&mut self) -> String {
        self.text.take().map(text::TextStream::finish).unwrap_or_default()
    }
}
