//! The control connection: messages and device state, one reader thread, writes from the owner of the migration.

use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use sterna_engine::wire::Message;
use sterna_engine::wire::control::{
    ControlHeader, ControlKind, HEADER_BYTES, STATE_BYTES_MAX, STATE_PIECE_BYTES_MAX, decode_message,
    encode_message, state_header,
};
use sterna_transport::{Connection, Counters, Endpoint, Shutdown, TransportError, Writer};

/// How long a message may take to be written. The other end reads all the time; only a dead one lets this pass.
const WRITE_WITHIN: Duration = Duration::from_secs(20);
/// Most bytes of messages on one connection. They wait in memory while their receiver is at work, some forty times as large
/// when decoded; the longest migrations (a round a second on 64 streams) confirm their rounds with it for hours.
const MESSAGES_BYTES_MAX: u64 = 16 << 20;
/// How long a peer may take to say what it wants.
pub(crate) const FIRST_MESSAGE_WITHIN: Duration = Duration::from_secs(5);
/// How long reaching a peer's agent may take.
pub(crate) const CONNECT_WITHIN: Duration = Duration::from_secs(5);

/// What arrives on a control connection.
#[expect(clippy::large_enum_variant, reason = "there is one at a time, and it is taken apart at once")]
#[derive(Debug)]
pub(crate) enum Arrival {
    Message(Message),
    /// The next piece of the device state.
    State(Vec<u8>),
    /// The connection is lost, or what came is not the protocol.
    Lost(String),
}

/// One end of a control connection.
pub(crate) struct Control {
    writer: Writer,
    shutdown: Shutdown,
    counters: Counters,
    thread: Option<JoinHandle<()>>,
}

impl Control {
    /// Starts to read; `tell` is called for each arrival, and last with [`Arrival::Lost`].
    pub(crate) fn start(connection: Connection, tell: impl Fn(Arrival) + Send + 'static) -> Self {
        let (shutdown, counters) = (connection.shutdown_handle(), connection.counters());
        let (mut reader, writer) = connection.split();
        reader.set_deadline(None);
        let thread = std::thread::spawn(move || {
            let mut left = MESSAGES_BYTES_MAX + STATE_BYTES_MAX;
            let mut left_for_messages = MESSAGES_BYTES_MAX;
            loop {
                let mut bytes = 0;
                let frame = read_frame(|buffer| {
                    bytes += buffer.len() as u64;
                    reader.read_exact(buffer)
                });
                left = left.saturating_sub(bytes);
                if !matches!(frame, Ok(Arrival::State(_))) {
                    left_for_messages = left_for_messages.saturating_sub(bytes);
                }
                match frame {
                    _ if left == 0 || left_for_messages == 0 => {
                        return tell(Arrival::Lost("the peer sent more than any migration needs".into()));
                    }
                    Ok(arrival) => tell(arrival),
                    Err(why) => return tell(Arrival::Lost(why)),
                }
            }
        });
        Self { writer, shutdown, counters, thread: Some(thread) }
    }

    /// Bytes sent so far, on the wire.
    pub(crate) fn counters(&self) -> Counters {
        self.counters.clone()
    }

    pub(crate) fn send(&mut self, message: &Message) -> Result<(), String> {
        let frame = encode_message(message).map_err(|why| why.to_string())?;
        self.writer.set_deadline(Some(Instant::now() + WRITE_WITHIN));
        self.writer.write_all(&frame).and_then(|()| self.writer.flush()).map_err(|why| why.to_string())
    }

    /// Sends device state, in pieces.
    pub(crate) fn send_state(&mut self, state: &[u8]) -> Result<(), String> {
        self.writer.set_deadline(Some(Instant::now() + WRITE_WITHIN));
        for piece in state.chunks(STATE_PIECE_BYTES_MAX) {
            let sent =
                self.writer.write_all(&state_header(piece)).and_then(|()| self.writer.write_all(piece));
            sent.map_err(|why| why.to_string())?;
        }
        self.writer.flush().map_err(|why| why.to_string())
    }

    /// Says that nothing more will come, so that the last message is not lost with the connection.
    pub(crate) fn finish(mut self) {
        self.writer.set_deadline(Some(Instant::now() + WRITE_WITHIN));
        drop(self.writer.finish());
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        self.shutdown.shutdown();
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

fn read_frame(mut read: impl FnMut(&mut [u8]) -> Result<(), TransportError>) -> Result<Arrival, String> {
    let mut head = [0; HEADER_BYTES];
    read(&mut head).map_err(|why| why.to_string())?;
    let header = ControlHeader::decode(&head).map_err(|why| why.to_string())?;
    let mut body = vec![0; header.bytes];
    read(&mut body).map_err(|why| why.to_string())?;
    match header.kind {
        ControlKind::Message => decode_message(&body).map(Arrival::Message).map_err(|why| why.to_string()),
        ControlKind::State => Ok(Arrival::State(body)),
    }
}

/// Reads one message from a connection that has not been split.
pub(crate) fn receive(connection: &mut Connection, within: Duration) -> Result<Message, String> {
    connection.set_read_deadline(Some(Instant::now() + within));
    match read_frame(|buffer| connection.read_exact(buffer))? {
        Arrival::Message(message) => Ok(message),
        _ => Err("the peer sent device state where a message was due".into()),
    }
}

/// Writes one message to a connection that has not been split.
pub(crate) fn send(connection: &mut Connection, message: &Message) -> Result<(), String> {
    let frame = encode_message(message).map_err(|why| why.to_string())?;
    connection.set_write_deadline(Some(Instant::now() + WRITE_WITHIN));
    connection.write_all(&frame).and_then(|()| connection.flush()).map_err(|why| why.to_string())
}

/// Writes a piece of a stream of bytes, not longer than device state may be.
pub(crate) fn send_piece(connection: &mut Connection, piece: &[u8], within: Duration) -> Result<(), String> {
    connection.set_write_deadline(Some(Instant::now() + within));
    let sent = connection.write_all(&state_header(piece)).and_then(|()| connection.write_all(piece));
    sent.and_then(|()| connection.flush()).map_err(|why| why.to_string())
}

/// Reads the next piece of a stream of bytes.
pub(crate) fn receive_piece(connection: &mut Connection, within: Duration) -> Result<Vec<u8>, String> {
    connection.set_read_deadline(Some(Instant::now() + within));
    match read_frame(|buffer| connection.read_exact(buffer))? {
        Arrival::State(piece) => Ok(piece),
        _ => Err("the peer sent a message where a piece was due".into()),
    }
}

/// Asks a peer one question on a connection of its own.
pub(crate) fn ask(
    endpoint: &Endpoint,
    address: &str,
    host: &str,
    question: &Message,
) -> Result<Message, String> {
    let mut connection = endpoint.connect(address, host, CONNECT_WITHIN).map_err(|why| explain(&why))?;
    send(&mut connection, question)?;
    receive(&mut connection, FIRST_MESSAGE_WITHIN)
}

/// An error with its causes, in one line.
pub(crate) fn explain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(why) = cause {
        text = format!("{text}: {why}");
        cause = why.source();
    }
    text
}
