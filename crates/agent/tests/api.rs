//! The API over a real Unix socket, with a fake agent behind it.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, its helpers too")]

mod fake;

use fake::{Server, wait_until};
use http_body_util::{BodyExt, Full};
use hyper::body::Bytes;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use std::path::Path;
use tokio::net::UnixStream;

struct Reply {
    status: StatusCode,
    headers: hyper::HeaderMap,
    text: String,
}

impl Reply {
    fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|_| panic!("no JSON: {}", self.text))
    }

    /// Checks that it is a problem as RFC 9457 has it.
    fn problem(&self, status: u16) -> Value {
        assert_eq!(self.status.as_u16(), status, "{}", self.text);
        assert_eq!(self.headers["content-type"], "application/problem+json");
        let problem = self.json();
        assert_eq!(problem["status"], status);
        assert!(problem["detail"].as_str().is_some_and(|text| !text.is_empty()), "{problem}");
        problem
    }
}

fn ask(server: &Server, request: Request<Full<Bytes>>) -> Reply {
    ask_at(&server.socket(), request)
}

fn ask_at(socket: &Path, request: Request<Full<Bytes>>) -> Reply {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let stream = UnixStream::connect(socket).await.unwrap();
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection);
        let reply: Response<_> = sender.send_request(request).await.unwrap();
        let (head, body) = reply.into_parts();
        let body = body.collect().await.unwrap().to_bytes();
        Reply { status: head.status, headers: head.headers, text: String::from_utf8(body.into()).unwrap() }
    })
}

fn request(
    method: Method,
    path: &str,
    headers: &[(&str, &str)],
    body: impl Into<Bytes>,
) -> Request<Full<Bytes>> {
    let builder = Request::builder().method(method).uri(path).header("host", "agent");
    let builder = headers.iter().fold(builder, |builder, (name, value)| builder.header(*name, *value));
    builder.body(Full::new(body.into())).unwrap()
}

fn get(server: &Server, path: &str) -> Reply {
    ask(server, request(Method::GET, path, &[], ""))
}

fn post(server: &Server, path: &str, body: &Value) -> Reply {
    ask(server, request(Method::POST, path, &[], body.to_string()))
}

fn migrate(server: &Server, vm: &str) -> String {
    let reply = post(server, "/v1/migrations", &json!({"vm": vm, "host": "hostb"}));
    assert_eq!(reply.status, 202, "{}", reply.text);
    reply.json()["id"].as_str().unwrap().to_owned()
}

#[test]
fn a_vm_is_run_listed_read_and_stopped() {
    let server = Server::start();
    let made = post(&server, "/v1/vms", &json!({"name": "new", "argv": ["qemu-system-x86_64", "-m", "1G"]}));
    assert_eq!(made.status, 201, "{}", made.text);
    assert_eq!(made.headers["location"], "/v1/vms/new");
    let names = get(&server, "/v1/vms").json();
    assert!(names.as_array().unwrap().iter().any(|vm| vm["name"] == "new"), "{names}");
    assert_eq!(get(&server, "/v1/vms/new").json()["argv"][2], "1G");
    assert_eq!(get(&server, "/v1/hosts").json()[1]["name"], "hostb");
    assert_eq!(ask(&server, request(Method::DELETE, "/v1/vms/new", &[], "")).status, 204);
    get(&server, "/v1/vms/new").problem(404);
}

#[test]
fn each_error_of_the_agent_has_its_status() {
    let server = Server::start();
    assert_eq!(
        post(&server, "/v1/vms", &json!({"name": "x", "argv": ["/bin/sh"]})).problem(400)["type"],
        "invalid"
    );
    assert_eq!(get(&server, "/v1/migrations/none").problem(404)["type"], "not-found");
    let twice = post(&server, "/v1/vms", &json!({"name": "web", "argv": ["qemu"]}));
    assert_eq!(twice.problem(409)["type"], "conflict");
    let refused = post(&server, "/v1/migrations", &json!({"vm": "refused", "host": "hostb"})).problem(422);
    assert_eq!(refused["reasons"][0]["code"], "vfio");
    assert_eq!(refused["reasons"][1]["code"], "memory");
    assert_eq!(
        post(&server, "/v1/migrations", &json!({"vm": "panics", "host": "b"})).problem(500)["type"],
        "failed"
    );
    assert_eq!(get(&server, "/healthz").status, 200, "the API survives a call that panicked");
}

#[test]
fn what_is_no_request_is_refused_and_does_no_harm() {
    let server = Server::start();
    get(&server, "/v2/vms").problem(404);
    ask(&server, request(Method::PUT, "/v1/vms", &[], "")).problem(405);
    ask(&server, request(Method::POST, "/v1/vms", &[], "{")).problem(400);
    ask(&server, request(Method::POST, "/v1/vms", &[], "[[[[")).problem(400);
    ask(&server, request(Method::POST, "/v1/vms", &[], vec![b' '; (256 << 10) + 1])).problem(413);
    ask(&server, request(Method::PATCH, "/v1/migrations/%2e%2e%2f", &[], "{}")).problem(404);
    let body = json!({"vm": "web", "host": "hostb"}).to_string();
    let long = "k".repeat(1000);
    for key in ["", long.as_str()] {
        ask(&server, request(Method::POST, "/v1/migrations", &[("idempotency-key", key)], body.clone()))
            .problem(400);
    }
    assert_eq!(get(&server, "/v1/migrations").json(), json!([]));
}

#[test]
fn a_repeated_key_begins_one_migration() {
    let server = Server::start();
    let body = json!({"vm": "stuck", "host": "hostb"}).to_string();
    let again =
        || ask(&server, request(Method::POST, "/v1/migrations", &[("Idempotency-Key", "k1")], body.clone()));
    let (first, second) = (again(), again());
    assert_eq!(first.status, 202);
    assert_eq!(first.headers["location"], "/v1/migrations/m1");
    assert_eq!(first.json()["id"], second.json()["id"]);
    assert_eq!(get(&server, "/v1/migrations").json().as_array().unwrap().len(), 1);
}

#[test]
fn events_show_each_state_and_end_with_the_final_one() {
    let server = Server::start();
    let id = migrate(&server, "web");
    let reply = get(&server, &format!("/v1/migrations/{id}/events"));
    assert_eq!(reply.headers["content-type"], "text/event-stream");
    let last = reply.text.trim_end().rsplit("\n\n").next().unwrap();
    let mut fields = last.lines();
    assert_eq!(fields.next(), Some("event: end"), "{}", reply.text);
    let data: Value = serde_json::from_str(fields.next().unwrap().strip_prefix("data: ").unwrap()).unwrap();
    assert_eq!(data["status"], "completed");
    assert_eq!(data["runs-at"], "hostb");
    assert!(reply.text.contains("event: progress"), "{}", reply.text);

    let lines = [("accept", "application/jsonl")];
    let reply = ask(&server, request(Method::GET, &format!("/v1/migrations/{id}/events"), &lines, ""));
    assert_eq!(reply.headers["content-type"], "application/jsonl");
    assert_eq!(reply.text.lines().count(), 1, "a migration that is over has one line: {}", reply.text);
    assert_eq!(reply.json()["status"], "completed");
}

#[test]
fn a_migration_is_changed_and_cancelled() {
    let server = Server::start();
    let id = migrate(&server, "stuck");
    let path = format!("/v1/migrations/{id}");
    let body = json!({"max-bandwidth": 1000, "downtime-limit": 50}).to_string();
    let changed = ask(&server, request(Method::PATCH, &path, &[], body)).json();
    assert_eq!((&changed["max-bandwidth"], &changed["downtime-limit"]), (&json!(1000), &json!(50)));
    assert_eq!(ask(&server, request(Method::DELETE, &path, &[], "")).status, 202);
    wait_until(|| get(&server, &path).json()["status"] == "cancelled");
    let late = migrate(&server, "late");
    ask(&server, request(Method::DELETE, &format!("/v1/migrations/{late}"), &[], "")).problem(409);
}

#[test]
fn a_migration_is_switched_to_postcopy_once_and_not_taken_back() {
    let server = Server::start();
    let switch = |id: &str| post(&server, &format!("/v1/migrations/{id}/postcopy"), &json!({}));
    let status = |id: &str| get(&server, &format!("/v1/migrations/{id}")).json()["status"].clone();
    switch("none").problem(404);
    get(&server, "/v1/migrations/none/postcopy").problem(405);
    let id = migrate(&server, "stuck");
    wait_until(|| status(&id) == "active");
    // No body is needed.
    let path = format!("/v1/migrations/{id}/postcopy");
    let switched = ask(&server, request(Method::POST, &path, &[], ""));
    assert_eq!((switched.status.as_u16(), &switched.json()["id"]), (202, &json!(id)));
    wait_until(|| status(&id) == "completed");
    assert_eq!(switch(&id).problem(409)["type"], "conflict");
    let view = get(&server, &format!("/v1/migrations/{id}")).json();
    let known = &view["postcopy"];
    assert_eq!((&known["postcopy-requests"], &known["pushed-pages"]), (&json!(120), &json!(3000)));
    assert_eq!((&known["faults"], &known["postcopy-latency"]["p99"]), (&json!(100), &json!(2500)));
    assert_eq!(known["postcopy-vcpu-blocktime"], json!([12.5, 40.0]));

    let late = migrate(&server, "late");
    switch(&late).problem(409);
    let view = get(&server, &format!("/v1/migrations/{late}")).json();
    assert_eq!(view["postcopy-refusal"], "its RAM is in huge pages");
    ask(&server, request(Method::DELETE, &format!("/v1/migrations/{late}"), &[], ""));
}

#[test]
fn a_measurement_is_a_stream_of_intervals_and_a_result() {
    let server = Server::start();
    let path = "/v1/vms/web/working-set";
    let reply = post(&server, path, &json!({}));
    assert_eq!(reply.headers["content-type"], "text/event-stream");
    assert_eq!(reply.text.matches("event: interval").count(), 3, "{}", reply.text);
    assert_eq!(reply.text.matches("event: end").count(), 1, "{}", reply.text);
    let asked = server.fake.measures.lock().unwrap()[0].clone();
    assert_eq!((asked.interval, asked.duration, asked.max_cost), (1000, 60_000, 3.0), "the defaults");
    assert_eq!(asked.bandwidths, [12_500_000, 50_000_000, 125_000_000, 1_250_000_000]);

    let body = json!({"interval": 250, "max-cost": 1.5, "downtime-limit": 50}).to_string();
    let reply = ask(&server, request(Method::POST, path, &[("accept", "application/jsonl")], body));
    assert_eq!(reply.headers["content-type"], "application/jsonl");
    let lines: Vec<Value> = reply.text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len(), 4, "{}", reply.text);
    assert_eq!((&lines[0]["event"], &lines[0]["unique-pages"]), (&json!("interval"), &json!(120)));
    let end = lines.last().unwrap();
    assert_eq!(
        (&end["event"], &end["status"], &end["interval"]),
        (&json!("end"), &json!("completed"), &json!(250))
    );
    assert_eq!(end["predictions"].as_array().unwrap().len(), 4);
    for key in ["populated-pages", "dirty-pages-rate", "growth", "regions", "intervals"] {
        assert!(!end[key].is_null(), "{key}: {end}");
    }
    let asked = server.fake.measures.lock().unwrap()[1].clone();
    assert_eq!((asked.interval, asked.max_cost, asked.downtime_limit), (250, 1.5, 50));
    post(&server, "/v1/vms/nobody/working-set", &json!({})).problem(404);
    post(&server, "/v1/vms/lost/working-set", &json!({})).problem(409);
    post(&server, path, &json!({"interval": "often"})).problem(400);
}

#[test]
fn hanging_up_ends_a_measurement() {
    use std::io::{Read as _, Write as _};
    use std::sync::atomic::Ordering;
    let server = Server::start();
    let mut stream = std::os::unix::net::UnixStream::connect(server.socket()).unwrap();
    let head = "POST /v1/vms/stuck/working-set HTTP/1.1\r\nhost: agent\r\ncontent-length: 2\r\n\r\n{}";
    stream.write_all(head.as_bytes()).unwrap();
    assert!(stream.read(&mut [0; 100]).unwrap() > 0);
    assert!(server.fake.measuring.load(Ordering::SeqCst));
    post(&server, "/v1/vms/stuck/working-set", &json!({})).problem(409);
    drop(stream);
    wait_until(|| !server.fake.measuring.load(Ordering::SeqCst));
}

#[test]
fn metrics_follow_the_migrations() {
    let server = Server::start();
    migrate(&server, "stuck");
    wait_until(|| get(&server, "/metrics").text.contains("_dirty_memory_rate_bytes{vm=\"stuck\""));
    let text = get(&server, "/metrics").text;
    let labels = "{vm=\"stuck\",source=\"hosta\",target=\"hostb\"}";
    for name in
        ["data_total", "data_processed", "data_remaining", "dirty_memory_rate", "memory_transfer_rate"]
    {
        assert!(text.contains(&format!("sterna_migration_{name}_bytes{labels}")), "{name}: {text}");
    }
    for reference in ["zero", "template", "common", "patch", "bytes"] {
        let labels = format!("{{vm=\"stuck\",source=\"hosta\",target=\"hostb\",reference=\"{reference}\"}}");
        assert!(text.contains(&format!("sterna_migration_pages{labels} ")), "{reference}: {text}");
        assert!(text.contains(&format!("sterna_migration_saved_bytes{labels} ")), "{reference}: {text}");
    }
    assert!(text.contains("sterna_vms{state=\"running\"} 12"), "{text}");
    assert!(text.contains("sterna_agent_info{host=\"hosta\""), "{text}");
    ask(&server, request(Method::DELETE, "/v1/migrations/m1", &[], ""));
    wait_until(|| get(&server, "/metrics").text.contains(&format!("sterna_migration_cancelled{labels} 1")));
    assert!(
        !get(&server, "/metrics").text.contains("data_total_bytes{"),
        "a migration that ended has no progress"
    );
    migrate(&server, "web");
    wait_until(|| get(&server, "/metrics").text.contains("sterna_migration_succeeded{vm=\"web\""));
    let text = get(&server, "/metrics").text;
    assert!(text.contains("sterna_migration_downtime_seconds_bucket{le=\"0.01\"} 1"), "{text}");
}

#[test]
fn metrics_tell_of_vms_that_run_with_pages_missing() {
    let server = Server::start();
    server.fake.vms.lock().unwrap().get_mut("idle").unwrap().state = "postcopy-paused".to_owned();
    let lazily = json!({"vm": "slowly", "host": "hostb", "postcopy": true});
    let id = post(&server, "/v1/migrations", &lazily).json()["id"].as_str().unwrap().to_owned();
    let labels = "{vm=\"slowly\",source=\"hosta\",target=\"hostb\"}";
    let told =
        |name: &str| get(&server, "/metrics").text.contains(&format!("sterna_migration_{name}{labels} 1"));
    wait_until(|| told("postcopy_active"));
    for status in ["postcopy-paused", "postcopy-recover"] {
        let sender = server.fake.migrations.lock().unwrap()[0].1.clone();
        sender.send_modify(|view| view.status = status.to_owned());
        assert!(told("postcopy_paused") && !told("postcopy_active"), "{status}");
    }
    let text = get(&server, "/metrics").text;
    for line in ["data_remaining_bytes", "postcopy_requested_pages", "postcopy_pushed_pages"]
        .map(|name| format!("sterna_migration_{name}{labels} "))
    {
        assert!(text.contains(&line), "{line}: {text}");
    }
    assert!(text.contains("sterna_vms{state=\"postcopy-paused\"} 1"), "{text}");
    ask(&server, request(Method::DELETE, &format!("/v1/migrations/{id}"), &[], "")).problem(409);
    wait_until(|| told("succeeded"));
    let text = get(&server, "/metrics").text;
    assert!(text.contains("sterna_migration_postcopy_longest_wait_seconds_bucket{le=\"0.01\"} 1"), "{text}");
    assert!(!text.contains("postcopy_pushed_pages{"), "{text}");
}

#[test]
fn the_openapi_document_names_every_route() {
    let server = Server::start();
    let document = get(&server, "/openapi.json").json();
    let paths = document["paths"].as_object().unwrap();
    for (path, methods) in [
        ("/v1/vms", vec!["get", "post"]),
        ("/v1/vms/{name}", vec!["get", "delete"]),
        ("/v1/vms/{name}/working-set", vec!["post"]),
        ("/v1/hosts", vec!["get"]),
        ("/v1/migrations", vec!["get", "post"]),
        ("/v1/migrations/{id}", vec!["get", "delete", "patch"]),
        ("/v1/migrations/{id}/postcopy", vec!["post"]),
        ("/v1/migrations/{id}/events", vec!["get"]),
        ("/healthz", vec!["get"]),
        ("/readyz", vec!["get"]),
        ("/metrics", vec!["get"]),
        ("/openapi.json", vec!["get"]),
    ] {
        for method in methods {
            assert!(paths[path][method].is_object(), "{method} {path}");
        }
    }
    let view = &document["components"]["schemas"]["MigrationView"]["properties"];
    assert!(view["downtime-limit"].is_object(), "the schema has the names that are on the wire: {view}");
    assert_eq!(view["began"]["format"], "date-time");
}

#[test]
fn a_shutdown_ends_streams_and_removes_the_socket() {
    let mut server = Server::start();
    let id = migrate(&server, "stuck");
    assert_eq!(get(&server, "/readyz").status, 200);
    let socket = server.socket();
    let stream = std::thread::spawn(move || {
        ask_at(&socket, request(Method::GET, &format!("/v1/migrations/{id}/events"), &[], ""))
    });
    let sender = server.fake.migrations.lock().unwrap()[0].1.clone();
    wait_until(|| sender.receiver_count() > 0);
    server.end();
    assert!(!server.socket().exists());
    let text = stream.join().unwrap().text;
    assert!(text.contains("event: progress") && !text.contains("event: end"), "{text}");
}
