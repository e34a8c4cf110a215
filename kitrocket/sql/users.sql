-- name: insert_user
-- A new user. $1 id, $2 e-mail (normalised), $3 name, $4 avatar, $5 now: both created_at and updated_at.
INSERT INTO users (id, email, name, email_verified, avatar, created_at, updated_at)
VALUES ($1, $2, $3, NULL, $4, $5, $5)
RETURNING id, email, name, email_verified, avatar, created_at, updated_at;

-- name: insert_credential
-- The account behind e-mail and password; its provider_account_id is the user's id, by which Better Auth finds it.
-- $1 id, $2 user, $3 hash, $4 now.
INSERT INTO accounts (id, user_id, provider, provider_account_id, access_token, refresh_token, expires_at, password, created_at)
VALUES ($1, $2, 'credential', $2, NULL, NULL, NULL, $3, $4);

-- name: user_by_email
-- The user with an e-mail address. $1 the address, normalised.
-- Where another writer left case variants, the one stored in this form comes first, then the oldest.
SELECT id, email, name, email_verified, avatar, created_at, updated_at
FROM users
WHERE lower(email) = $1
ORDER BY email = $1 DESC, created_at, id
LIMIT 1;

-- name: user_with_subscription
-- A user and the subscription row that counts: live first, then one that the mirror knows, then the newest.
-- The ORDER BY stands in subscriptions.sql too, and must stay the same. $1 user.
SELECT
    u.id, u.email, u.name, u.email_verified, u.avatar, u.created_at, u.updated_at,
    chosen.id AS subscription_id, chosen.plan, chosen.status, chosen.dodo_customer_id, chosen.dodo_subscription_id,
    chosen.current_period_end, chosen.created_at AS subscription_created_at,
    chosen.updated_at AS subscription_updated_at
FROM users u
LEFT JOIN LATERAL (
    SELECT s.*
    FROM subscriptions s
    LEFT JOIN kitrocket.dodo_subscriptions m ON m.subscription_id = s.dodo_subscription_id
    WHERE s.user_id = u.id
    ORDER BY
        s.status IN ('active', 'trialing', 'past_due') DESC, m.subscription_id IS NOT NULL DESC, s.created_at DESC, s.id DESC
    LIMIT 1
) chosen ON true
WHERE u.id = $1;

-- name: mark_email_verified
-- Notes when the address was verified; the first time stays. $1 user, $2 now, $3 the address that was verified, or NULL:
-- whichever the user has. Nothing changes when the user has another address by now. One UPDATE, so that it is decided
-- on the locked row.
UPDATE users
SET
    email_verified = CASE
        WHEN email_verified IS NULL AND ($3::text IS NULL OR lower(email) = $3) THEN $2 ELSE email_verified
    END,
    updated_at = CASE
        WHEN email_verified IS NULL AND ($3::text IS NULL OR lower(email) = $3) THEN $2 ELSE updated_at
    END
WHERE id = $1
RETURNING id, email, name, email_verified, avatar, created_at, updated_at;

-- name: lock_user_to_delete
-- Makes every insert of a row of this user wait, so that the counts hold until the end. $1 user.
SELECT id FROM users WHERE id = $1 FOR UPDATE;

-- name: count_rows_of_user
-- What goes with a user. $1 user.
SELECT
    (SELECT count(*) FROM sessions WHERE user_id = $1) AS sessions,
    (SELECT count(*) FROM accounts WHERE user_id = $1) AS accounts,
    (SELECT count(*) FROM subscriptions WHERE user_id = $1) AS subscriptions,
    (SELECT count(*) FROM usage WHERE user_id = $1) AS usage;

-- name: delete_user
-- A user, and by cascade every row of the user's. $1 user.
DELETE FROM users WHERE id = $1;

-- name: credential_by_email
-- A user with the account that holds the password, if there is one. $1 the address, normalised.
SELECT
    u.id, u.email, u.name, u.email_verified, u.avatar, u.created_at, u.updated_at,
    a.id AS account_id, a.password
FROM users u
LEFT JOIN accounts a ON a.user_id = u.id AND a.provider = 'credential'
WHERE lower(u.email) = $1
ORDER BY
    u.email = $1 DESC, u.created_at, u.id,
    a.provider_account_id = u.id DESC NULLS LAST, a.created_at, a.id
LIMIT 1;

-- name: replace_hash
-- Puts a new hash of the same password in the place of an old one, unless the password was changed meanwhile.
-- $1 account, $2 the old hash, $3 the new one.
UPDATE accounts SET password = $3 WHERE id = $1 AND password = $2;
