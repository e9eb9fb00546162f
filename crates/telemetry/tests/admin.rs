//! The admin socket: served, asked, replaced, guarded, bounded.

use std::os::unix::fs::PermissionsExt as _;
use std::sync::Arc;
use std::time::Duration;

use axum::http::StatusCode;
use axum::routing::{get, post};
use axum::{Json, Router};
use romulus_telemetry::{
    AdminClient, CONNECTIONS_MAX, Metrics, Server, TelemetryError, catalogue, health_router, serve_admin,
    serve_metrics,
};
use serde_json::{Value, json};
use tokio::io::AsyncReadExt as _;
use tokio::net::UnixStream;

fn router() -> Router {
    Router::new()
        .route(
            "/v1/status",
            get(|| async { Json(json!({"state": "protected"})) }),
        )
        .route("/v1/echo", post(|Json(body): Json<Value>| async { Json(body) }))
        .route(
            "/v1/no",
            post(|| async { (StatusCode::CONFLICT, Json(json!({"error": "not now"}))) }),
        )
        .route("/v1/slow", get(|| async { std::future::pending::<()>().await }))
        .route(
            "/v1/text",
            get(|| async { (StatusCode::IM_A_TEAPOT, "short and stout") }),
        )
        .route("/v1/huge", get(|| async { "x".repeat(17 << 20) }))
}

#[tokio::test]
async fn a_client_gets_what_the_daemon_says() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("sub/admin.sock");
    let server = serve_admin(&path, None, router()).unwrap();
    let client = AdminClient::new(&path);
    assert_eq!(
        client.get("/v1/status").await.unwrap(),
        json!({"state": "protected"})
    );
    assert_eq!(
        client.post("/v1/echo", &json!({"a": [1, 2]})).await.unwrap(),
        json!({"a": [1, 2]})
    );
    assert_eq!(
        client.post("/v1/no", &json!({})).await.unwrap()["error"],
        "not now"
    );
    let mode = std::fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o660);
    drop(server);
    assert!(!path.exists());
}

#[tokio::test]
async fn answers_that_are_late_huge_or_not_json_are_named_errors() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("admin.sock");
    let _server = serve_admin(&path, None, router()).unwrap();
    let client = AdminClient::new(&path).with_timeout(Duration::from_millis(200));
    assert!(matches!(
        client.get("/v1/slow").await,
        Err(TelemetryError::Timeout { .. })
    ));
    let client = AdminClient::new(&path);
    assert!(matches!(
        client.get("/v1/huge").await,
        Err(TelemetryError::Body(_))
    ));
    assert!(matches!(
        client.get("/v1/text").await,
        Err(TelemetryError::Answer { status: 418, .. })
    ));
    assert!(matches!(
        client.get("/v1/nowhere").await,
        Err(TelemetryError::Answer { status: 404, .. })
    ));
    assert!(matches!(
        client.get("not a path").await,
        Err(TelemetryError::Path { .. })
    ));
    let nobody = AdminClient::new(dir.path().join("nobody.sock"));
    assert!(matches!(
        nobody.get("/v1/status").await,
        Err(TelemetryError::Unreachable { .. })
    ));
}

#[tokio::test]
async fn a_dead_daemons_socket_is_replaced_and_a_live_ones_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("admin.sock");
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    assert!(path.exists(), "a closed listener leaves its file");
    let _server = serve_admin(&path, None, router()).unwrap();
    let second = serve_admin(&path, None, router());
    assert!(matches!(second, Err(TelemetryError::SocketInUse { .. })));
    assert!(AdminClient::new(&path).get("/v1/status").await.is_ok());
}

#[tokio::test]
async fn a_file_in_the_sockets_place_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("precious");
    std::fs::write(&path, "data").unwrap();
    assert!(matches!(
        serve_admin(&path, None, router()),
        Err(TelemetryError::NotASocket { .. })
    ));
    assert_eq!(std::fs::read(&path).unwrap(), b"data");
}

#[tokio::test]
async fn connections_beyond_the_limit_wait_until_others_end() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("admin.sock");
    let _server = serve_admin(&path, None, router()).unwrap();
    let mut idle = Vec::new();
    for _ in 0..CONNECTIONS_MAX {
        idle.push(UnixStream::connect(&path).await.unwrap());
    }
    let client = AdminClient::new(&path).with_timeout(Duration::from_millis(300));
    assert!(matches!(
        client.get("/v1/status").await,
        Err(TelemetryError::Timeout { .. })
    ));
    idle.truncate(CONNECTIONS_MAX / 2);
    let client = client.with_timeout(Duration::from_secs(10));
    assert!(client.get("/v1/status").await.is_ok());
}

#[tokio::test]
async fn garbage_ends_its_own_connection_only() {
    use tokio::io::AsyncWriteExt as _;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("admin.sock");
    let _server = serve_admin(&path, None, router()).unwrap();
    let mut stream = UnixStream::connect(&path).await.unwrap();
    stream.write_all(&[0xff; 4096]).await.unwrap();
    let mut answer = Vec::new();
    // Either an error status or a reset, but an end.
    let _ = stream.read_to_end(&mut answer).await;
    assert!(AdminClient::new(&path).get("/v1/status").await.is_ok());
}

fn metrics() -> Metrics {
    Metrics::new(catalogue::WITNESS, "witness", "1", |samples| {
        samples.number(&catalogue::VMS, &[], 1);
    })
}

async fn ask(server: &Server, path: &str, head: &str) -> String {
    let address = server.local_addr().unwrap();
    let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
    let request = format!("GET {path} HTTP/1.0\r\n{head}\r\n");
    tokio::io::AsyncWriteExt::write_all(&mut stream, request.as_bytes())
        .await
        .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

#[tokio::test]
async fn metrics_are_on_the_socket_and_on_tcp_in_the_form_that_is_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("admin.sock");
    let _socket = serve_admin(&path, None, router().merge(metrics().router())).unwrap();
    let text = AdminClient::new(&path).text("/metrics").await.unwrap();
    assert!(text.contains("romulus_vms 1"), "{text}");
    let tcp = serve_metrics(Some(([127, 0, 0, 1], 0).into()), 1, metrics().router())
        .await
        .unwrap();
    let plain = ask(&tcp, "/metrics", "").await;
    assert!(
        plain.contains("text/plain; version=0.0.4")
            && plain.contains("romulus_vms 1")
            && !plain.contains("# EOF"),
        "{plain}"
    );
    let accept = "Accept: application/openmetrics-text;version=1.0.0,text/plain;q=0.5\r\n";
    let open = ask(&tcp, "/metrics", accept).await;
    assert!(
        open.contains("application/openmetrics-text") && open.contains("# EOF"),
        "{open}"
    );
}

#[tokio::test]
async fn a_taken_port_is_passed_over_and_none_at_all_is_no_end() {
    let held = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = Some(held.local_addr().unwrap());
    assert!(serve_metrics(taken, 1, metrics().router()).await.is_none());
    assert!(serve_metrics(None, 32, metrics().router()).await.is_none());
    // Some port of many is free, whatever else runs here.
    let server = serve_metrics(taken, 1000, metrics().router()).await.unwrap();
    assert_ne!(server.local_addr(), taken);
}

#[tokio::test]
async fn health_is_a_status_code_and_a_reason() {
    let ready = health_router(Arc::new(|| Ok(())), Arc::new(|| Err("no backup".into())));
    let server = serve_metrics(Some(([127, 0, 0, 1], 0).into()), 1, ready)
        .await
        .unwrap();
    let alive = ask(&server, "/healthz", "").await;
    assert!(
        alive.starts_with("HTTP/1.0 200") && alive.ends_with("ok\n"),
        "{alive}"
    );
    let not_ready = ask(&server, "/readyz", "").await;
    assert!(
        not_ready.starts_with("HTTP/1.0 503") && not_ready.ends_with("no backup\n"),
        "{not_ready}"
    );
}
